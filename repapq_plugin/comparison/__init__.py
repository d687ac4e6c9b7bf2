"""Methods side by side on one network: one scheme, one calibration set, one table."""

from repapq_plugin.comparison.compare import compare
from repapq_plugin.comparison.methods import ABLATIONS, METHODS, Method
from repapq_plugin.comparison.table import Comparison, Row

__all__ = ["ABLATIONS", "METHODS", "Comparison", "Method", "Row", "compare"]
