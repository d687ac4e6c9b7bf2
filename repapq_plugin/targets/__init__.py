"""Targets: what a runtime or a chip can compute, so that a network is quantized on its grid and in its form."""

from repapq_plugin.targets.builtin import TARGETS, find_target
from repapq_plugin.targets.target import Rule, Target

__all__ = ["TARGETS", "Rule", "Target", "find_target"]
