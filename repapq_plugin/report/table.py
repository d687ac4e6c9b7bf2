"""One table that sets a quantized network beside the float one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.table import Table

ABSENT = "-"


@dataclass(frozen=True)
class Row:
    """One network in the table.

    Args:
        name: What it is.
        scores: Values by column heading; a column it lacks stays empty.
        size_bytes: Size of its file or files.
        latency_ms: Milliseconds a batch of one takes.
    """

    name: str
    scores: Mapping[str, float | None] = field(default_factory=dict)
    size_bytes: int | None = None
    latency_ms: float | None = None


def comparison_table(rows: Sequence[Row], columns: Sequence[str], title: str, caption: str = "") -> Table:
    """Build the table.

    Args:
        rows: Networks, the float one first.
        columns: Headings of the score columns, in order.
        title: Above the table: the scheme.
        caption: Below it: how the latency was measured.
    """
    table = Table(title=title, caption=caption or None, title_justify="left", caption_justify="left")
    table.add_column("network")
    for heading in (*columns, "size", "latency"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            *(score_text(row.scores.get(heading), heading) for heading in columns),
            ABSENT if row.size_bytes is None else size_text(row.size_bytes),
            ABSENT if row.latency_ms is None else f"{row.latency_ms:.2f} ms",
        )
    return table


def score_text(value: float | None, heading: str) -> str:
    """Return a score as a column of that heading shows it."""
    if value is None:
        return ABSENT
    return f"{value:.2f}" if heading.endswith("%") else f"{value:.4f}"


def size_text(count: int) -> str:
    """Return a size in bytes as people read it."""
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
