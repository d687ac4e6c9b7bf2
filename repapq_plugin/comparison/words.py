"""Figures of a comparison as words: the same on a terminal and on a page."""

from __future__ import annotations

from repapq_plugin.comparison.table import Row
from repapq_plugin.report.table import ABSENT, score_text, size_text


def spread_text(found: tuple[float, float] | None, label: str) -> str:
    """Return a mean and, if there is one, its standard deviation."""
    if found is None:
        return ABSENT
    spread = f" ± {score_text(found[1], label)}" if found[1] else ""
    return f"{score_text(found[0], label)}{spread}"


def bits_text(row: Row) -> str:
    """Return the mean bits of weights and activations."""
    if row.weight_bits is None or row.activation_bits is None:
        return ABSENT
    return f"W{row.weight_bits:.3g} A{row.activation_bits:.3g}"


def size_or_none(count: int | None) -> str:
    """Return a number of bytes, if it is known."""
    return ABSENT if count is None else size_text(count)
