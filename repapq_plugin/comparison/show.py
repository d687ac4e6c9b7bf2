"""A comparison as people read it on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.table import Table

from repapq_plugin.comparison.table import Comparison, Row
from repapq_plugin.report.table import ABSENT


def shown_table(table: Comparison) -> Table:
    """Return the table: a line for each method, its seeds together, its scheme below its name."""
    runtime = next((row.runtime for row in table.rows if row.runtime), "integers")
    shown = Table(
        title=table.scheme,
        caption=f"{table.calibration}; {table.machine}. CPU s: processor time of the calibration, all threads. "
        "Memory: peak of the process that calibrated. Latency: one sample, beside the float network's in turns.",
        title_justify="left",
        caption_justify="left",
        show_lines=True,
    )
    shown.add_column("method, scheme", ratio=1)
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
            cells += [_score(summary.simulated.get(metric), label), _score(summary.integer.get(metric), label)]
            cells.append(_score(drop, label))
        shown.add_row(
            f"{row.title}{seeds}\n[dim]{row.failed or row.scheme}[/dim]",
            *cells,
            _bits(row),
            _size(row.size_bytes),
            _size(row.packed_bytes),
            ABSENT if summary.cpu_seconds is None else f"{summary.cpu_seconds:.1f}",
            _size(summary.peak_bytes),
            ABSENT if row.latency_ms is None else f"{row.latency_ms:.2f} / {row.float_ms:.2f} ms",
        )
    return shown


def lines_below(table: Comparison) -> Iterator[str]:
    """Yield a line for each thing that is worth knowing of a row, and for each one that has no figures."""
    for row in table.rows:
        seed = "" if row.seed is None else f", seed {row.seed}"
        if row.failed:
            yield f"{row.title}{seed}: no figures: {row.failed}"
        for note in row.notes:
            yield f"note: {row.title}{seed}: {note}"


def _score(found: tuple[float, float] | None, label: str) -> str:
    if found is None:
        return ABSENT
    digits = 2 if label.endswith("%") else 4
    spread = f" ± {found[1]:.{digits}f}" if found[1] else ""
    return f"{found[0]:.{digits}f}{spread}"


def _bits(row: Row) -> str:
    if row.weight_bits is None or row.activation_bits is None:
        return ABSENT
    return f"W{row.weight_bits:.3g} A{row.activation_bits:.3g}"


def _size(count: int | None) -> str:
    if count is None:
        return ABSENT
    for unit, size in _UNITS.items():
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


_UNITS: Mapping[str, float] = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
