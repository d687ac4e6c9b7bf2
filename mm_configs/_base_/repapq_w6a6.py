"""RepAPQ with 6-bit weights and activations: one more `_base_` beside any config of any toolbox."""

_base_ = []  # without this line mmengine takes a config that imports for one of the pure-Python kind

from repapq_plugin.configs.w6a6 import *  # noqa: E402, F403
