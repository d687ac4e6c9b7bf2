"""RepAPQ with 6-bit weights and activations and the paper's settings: one more `_base_` beside any config."""

_base_ = []  # without this line mmengine takes a config that imports for one of the pure-Python kind

from repapq_plugin.configs.paper_w6a6 import *  # noqa: E402, F403
