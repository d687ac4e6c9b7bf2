"""RepAPQ's settings as configs to import: one line beside whatever else a config says.

In an ordinary config, below its ``_base_``::

    from repapq_plugin.configs.w8a8 import *

In a config of mmengine's pure-Python kind, beside its other bases::

    with read_base():
        from repapq_plugin.configs.w8a8 import *

Each defines the two keys ``runner_type`` and ``repapq``, and nothing else, so that it can stand beside any other base.
"""
