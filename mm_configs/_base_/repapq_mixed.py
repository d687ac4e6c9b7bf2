"""RepAPQ with 4-bit weights and 8-bit activations: one more `_base_` beside any config of any toolbox."""

_base_ = []  # without this line mmengine takes a config that imports for one of the pure-Python kind

from repapq_plugin.configs.mixed import *  # noqa: E402, F403
