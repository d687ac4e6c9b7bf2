"""Configs by scoped name: ``repapq_plugin::_base_/repapq_w8a8.py`` beside ``mmdet::...`` and ``mmseg::...``.

mmengine looks such a name up before it runs any line of a config, so the name has to be known earlier. The command
``repapq`` sees to that, and ``python -m repapq_plugin.hosts.openmmlab`` does for any tool of a toolbox.
"""

from __future__ import annotations

from repapq_plugin.hosts.openmmlab._compat import add_scope

SCOPE = "repapq_plugin"
"""What stands before ``::`` in names of this package's configs."""


def register_scopes() -> None:
    """Make this package's configs known to mmengine by name; again is harmless."""
    add_scope(SCOPE)
