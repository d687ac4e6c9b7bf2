"""Observers on several ranks, each of which sees its own share of the data, become the observers of all data.

The result is the same to the last bit as if one process had seen all samples of each batch: counts are exact, whatever
the order in which they are added.
"""

from __future__ import annotations

from collections.abc import Sequence

from repapq_plugin.core import ranks
from repapq_plugin.observers.base import RangeObserver


def set_apart(observers: Sequence[RangeObserver]) -> None:
    """Tell observers that each batch is spread over ranks, if there are several."""
    if ranks.world().size > 1:
        for observer in observers:
            observer.apart()


def settle(observers: Sequence[RangeObserver]) -> None:
    """End a batch, or a rank's lack of one: let observers take in what they saw of it, by what all ranks saw."""
    if ranks.world().size == 1:
        return
    shares = ranks.gather([observer.sizes() for observer in observers])
    for observer, of_ranks in zip(observers, zip(*shares, strict=True), strict=True):
        calls = max(map(len, of_ranks))
        observer.settle([[sizes[call] for sizes in of_ranks if call < len(sizes)] for call in range(calls)])


def unite(observers: Sequence[RangeObserver]) -> None:
    """Let observers know what those of all ranks know, in place."""
    if ranks.world().size == 1:
        return
    for observer, values in zip(observers, ranks.greatest([each.extremes() for each in observers]), strict=True):
        observer.set_extremes(values)
    totals = [total for observer in observers for total in observer.totals()]
    for total, values in zip(totals, ranks.sum_(totals), strict=True):
        total.copy_(values)
