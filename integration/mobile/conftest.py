"""Collected only where the dependency group ``mobile`` is installed."""

from __future__ import annotations

from importlib.util import find_spec

NEEDED = ("executorch", "litert_torch", "ai_edge_litert")

collect_ignore_glob = [] if all(find_spec(name) for name in NEEDED) else ["test_*.py"]
