"""The page of a comparison: the best first, then the picture, every row with its scheme, and what has no figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from repapq_plugin.comparison.plot import FLOAT, chart
from repapq_plugin.comparison.table import Comparison, Summary
from repapq_plugin.comparison.words import bits_text, size_or_none, spread_text
from repapq_plugin.errors import ConfigError
from repapq_plugin.report.html import require_report, write_page
from repapq_plugin.report.page import Headline, Line, Page, Section, Table
from repapq_plugin.report.table import ABSENT, score_text

HOW = (
    "CPU s is processor time of the calibration, all threads together. Memory is the peak of the process that "
    "calibrated, libraries, model and data included. Latency is of one sample, in turns with the float network."
)


def has_report() -> bool:
    """Whether all that a page needs is installed."""
    try:
        require_report()
    except ConfigError:
        return False
    return True


def write_comparison(table: Comparison, path: str | Path, title: str = "Methods side by side") -> Path:
    """Write a comparison as one HTML page.

    Args:
        table: What was compared.
        path: File to write.
        title: Name of the network.

    Raises:
        ConfigError: A package is missing; the message names the extra.
        ExportError: The file cannot be written.
    """
    require_report()
    return write_page(comparison_page(table, title), path)


def comparison_page(table: Comparison, title: str = "Methods side by side") -> Page:
    """Return the page of a comparison."""
    summaries = table.summaries()
    return Page(
        "Comparison",
        title,
        table.scheme,
        list(_headlines(table, summaries)),
        (
            Section("Scores", figures=[chart(table)], tables=[_scores(table, summaries)]),
            Section("What it took", tables=[_costs(summaries)]),
            Section("Schemes", tables=[_schemes(summaries)]),
            Section("Without figures", text=[f"{row.title}: {row.failed}" for row in table.rows if row.failed]),
            Section("Notes", text=[f"{row.title}: {note}" for row in table.rows for note in row.notes]),
            Section("Every row", tables=[_rows(table)], folded=True),
            Section(
                "How it was made",
                tables=[
                    Table(
                        ["", ""],
                        [
                            Line(["Calibration", table.calibration]),
                            Line(["Machine", table.machine]),
                            *(Line([name, version]) for name, version in table.versions.items()),
                        ],
                        text_columns=2,
                    )
                ],
            ),
        ),
    )


def _headlines(table: Comparison, summaries: list[Summary]) -> Iterator[Headline]:
    metric, label = next(iter(table.metrics.items()))
    yield Headline(f"{label}, float", score_text(table.floats[metric], label))
    scored = [each for each in summaries if each.row.method != FLOAT and metric in each.simulated]
    for each in sorted(scored, key=lambda each: -each.simulated[metric][0])[:2]:
        drop = table.floats[metric] - each.simulated[metric][0]
        note = f"{score_text(drop, label)} below float"
        yield Headline(f"{label}, {each.row.title}", score_text(each.simulated[metric][0], label), note)


def _scores(table: Comparison, summaries: list[Summary]) -> Table:
    runtime = next((row.runtime for row in table.rows if row.runtime), "integers")
    headings = [text for label in table.metrics.values() for text in (label, f"on {runtime}", "drop")]
    metric = next(iter(table.metrics))
    best = max((each.simulated[metric][0] for each in summaries if _counts(each, metric)), default=None)
    lines = []
    for each in summaries:
        cells = [f"{each.row.title} ({each.seeds} seeds)" if each.seeds > 1 else each.row.title]
        for key, label in table.metrics.items():
            found = each.simulated.get(key) or each.integer.get(key)
            cells += [spread_text(each.simulated.get(key), label), spread_text(each.integer.get(key), label)]
            cells.append(ABSENT if found is None else score_text(table.floats[key] - found[0], label))
        strong = _counts(each, metric) and each.simulated[metric][0] == best
        lines.append(Line([*cells, bits_text(each.row)], strong=strong))
    return Table(["Method", *headings, "Bits"], lines, "Mean and standard deviation over the seeds; the best is bold.")


def _counts(each: Summary, metric: str) -> bool:
    return each.row.method != FLOAT and metric in each.simulated


def _costs(summaries: list[Summary]) -> Table:
    lines = []
    for each in summaries:
        row = each.row
        cells = [
            row.title,
            size_or_none(row.size_bytes),
            size_or_none(row.packed_bytes),
            ABSENT if each.cpu_seconds is None else f"{each.cpu_seconds:.1f}",
            size_or_none(each.peak_bytes),
            ABSENT if row.latency_ms is None else f"{row.latency_ms:.2f} ms",
            ABSENT if row.float_ms is None else f"{row.float_ms:.2f} ms",
        ]
        lines.append(Line(cells))
    return Table(["Method", "File", "Packed", "CPU s", "Memory", "Latency", "Float beside it"], lines, HOW)


def _schemes(summaries: list[Summary]) -> Table:
    lines = [Line([each.row.title, each.row.by or ABSENT, each.row.scheme]) for each in summaries]
    return Table(["Method", "By", "Scheme"], lines, text_columns=3)


def _rows(table: Comparison) -> Table:
    lines = []
    for row in table.rows:
        seed = ABSENT if row.seed is None else str(row.seed)
        said = [json.dumps(dict(part), default=str) for part in (row.simulated, row.integer, row.settings)]
        lines.append(Line([row.method, seed, *said]))
    return Table(["Method", "Seed", "Simulated", "In integers", "Settings"], lines, text_columns=5)
