"""A comparison as people read it on a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from repapq_plugin.comparison.table import Comparison
from repapq_plugin.comparison.words import bits_text, size_or_none, spread_text
from repapq_plugin.report.table import ABSENT


def shown_table(table: Comparison) -> Table:
    """Return the table: a line for each method, its seeds together; `lines_below` say all of its scheme."""
    runtime = next((row.runtime for row in table.rows if row.runtime), "integers")
    shown = Table(
        title=table.scheme,
        caption=f"{table.calibration}; {table.machine}. CPU s: processor time of the calibration, all threads. "
        "Memory: peak of the process that calibrated. Latency: one sample, beside the float network's in turns.",
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column("method")
    headings = [text for label in table.metrics.values() for text in (f"{label}", f"on {runtime}", "drop")]
    for heading in (*headings, "bits", "file", "packed", "CPU s", "memory", "latency"):
        shown.add_column(heading, justify="right")
    for summary in table.summaries():
        row = summary.row
        seeds = f" ({summary.seeds} seeds)" if summary.seeds > 1 else ""
        cells = []
        for metric, label in table.metrics.items():
            found = summary.simulated.get(metric) or summary.integer.get(metric)
            drop = None if found is None or metric not in table.floats else (table.floats[metric] - found[0], 0.0)
            cells += [
                spread_text(summary.simulated.get(metric), label),
                spread_text(summary.integer.get(metric), label),
            ]
            cells.append(spread_text(drop, label))
        shown.add_row(
            f"{row.title}{seeds}",
            *cells,
            bits_text(row),
            size_or_none(row.size_bytes),
            size_or_none(row.packed_bytes),
            ABSENT if summary.cpu_seconds is None else f"{summary.cpu_seconds:.1f}",
            size_or_none(summary.peak_bytes),
            ABSENT if row.latency_ms is None else f"{row.latency_ms:.2f} / {row.float_ms:.2f} ms",
        )
    return shown


def lines_below(table: Comparison) -> Iterator[str]:
    """Yield each method's scheme, then what is worth knowing of a row, and why one has no figures."""
    for summary in table.summaries():
        yield f"scheme: {summary.row.title}: {summary.row.scheme}"
    for row in table.rows:
        seed = "" if row.seed is None else f", seed {row.seed}"
        if row.failed:
            yield f"{row.title}{seed}: no figures: {row.failed}"
        for note in row.notes:
            yield f"note: {row.title}{seed}: {note}"
