"""RepAPQ with 4-bit weights and 8-bit activations: one more `_base_` beside any config of any toolbox.

Only the two keys `runner_type` and `repapq`, so that no other `_base_` file can collide with them; they stand in
`repapq_plugin.configs.mixed`, which an ordinary config may also import by itself.
"""

# Says that this is a config of the ordinary kind, although it imports.
_base_ = []

from repapq_plugin.configs.mixed import *  # noqa: E402, F403
