"""RepAPQ with 6-bit weights and activations: one more `_base_` beside any config of any toolbox.

Only the two keys `runner_type` and `repapq`, so that no other `_base_` file can collide with them; they stand in
`repapq_plugin.configs.w6a6`, which an ordinary config may also import by itself.
"""

# Says that this is a config of the ordinary kind, although it imports.
_base_ = []

from repapq_plugin.configs.w6a6 import *  # noqa: E402, F403
