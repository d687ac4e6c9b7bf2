"""Configs by scoped name: ``repapq_plugin::_base_/repapq_w8a8.py`` beside ``mmdet::...`` and ``mmseg::...``.

mmengine looks a name before ``::`` up in a table of its own before it runs any line of a config, so whatever adds to
that table has to be imported earlier: the command ``repapq`` does, and ``python -m repapq_plugin.hosts.openmmlab``
does for any tool of a toolbox.
"""

from __future__ import annotations

from importlib.util import find_spec

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.utils import is_installed

SCOPE = "repapq_plugin"
"""What stands before ``::`` in names of this package's configs."""


def register_scopes() -> None:
    """Make this package's configs known to mmengine by name; again is harmless.

    A toolbox that comes under another distribution name than mmengine's table expects is looked up by its module
    instead, so that its ``mmseg::...`` names work as well.
    """
    MODULE2PACKAGE.setdefault(SCOPE, SCOPE)
    for module, package in MODULE2PACKAGE.items():
        if module != package and not is_installed(package) and find_spec(module) is not None:
            MODULE2PACKAGE[module] = module
