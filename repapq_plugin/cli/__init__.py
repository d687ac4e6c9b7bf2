"""The command ``repapq``."""

from repapq_plugin.cli.commands import main

__all__ = ["main"]
