"""Ranges of least mean absolute error: RepAPQ's measure (arXiv:2402.16121, abstract)."""

from __future__ import annotations

from repapq_plugin.observers.base import SearchedRangeObserver, register_observer


@register_observer("mae")
class MAEObserver(SearchedRangeObserver):
    """Per tensor: the range that minimises ``E |x - x_hat|`` over everything seen.

    Outliers that appear in few samples or channels weigh linearly instead of quadratically, so they
    stretch the range less. Meant for activations. On the weights of a merged kernel, with its one
    large identity tap among many small ones, it clips that tap: there is no per-channel variant.
    """

    power = 1.0
