"""A picture of a comparison: a bar for each method, simulated and in integers, beside the float network."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from repapq_plugin.comparison.table import Comparison
from repapq_plugin.core.files import atomically, unwritable

FLOAT = "float"
"""Name of the float network's row."""

HEIGHT = 0.42
"""Of a method, in inches."""


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def plot_comparison(table: Comparison, path: str | Path) -> Path:
    """Draw the first metric of every method: the mean over its seeds, with the standard deviation.

    Args:
        table: What was compared.
        path: ``.svg`` or ``.png``.

    Raises:
        ExportError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    metric, label = next(iter(table.metrics.items()))
    found = [summary for summary in table.summaries() if summary.seeds and summary.row.method != FLOAT][::-1]
    figure = Figure(figsize=(9, 1.6 + HEIGHT * max(1, len(found))), layout="constrained")
    axes = figure.add_subplot()
    kinds = (
        ("simulated", "C0", 0.2, [each.simulated for each in found]),
        ("integer", "C1", -0.2, [each.integer for each in found]),
    )
    for name, colour, shift, scores in kinds:
        places = [place for place, each in enumerate(scores) if metric in each]
        if places:
            means, spreads = zip(*(scores[place][metric] for place in places), strict=True)
            bars = axes.barh([place + shift for place in places], means, 0.36, xerr=spreads, color=colour, label=name)
            axes.bar_label(bars, fmt="%.4g", padding=3, fontsize=7)
    axes.axvline(
        table.floats[metric], color="black", linewidth=1, linestyle="--", label=f"float {table.floats[metric]:.4g}"
    )
    axes.set_yticks(range(len(found)), [f"{each.row.title[:60]}" for each in found], fontsize=7)
    axes.set_xlabel(label)
    axes.set_title(table.scheme, fontsize=8, loc="left", wrap=True)
    axes.margins(x=0.12)
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, -0.02 - 1.1 / (1.6 + HEIGHT * max(1, len(found)))), ncols=3, fontsize=7
    )
    path = Path(path)
    try:
        with atomically(path) as partial:
            figure.savefig(partial, format=path.suffix[1:], dpi=150)
    except OSError as error:
        raise unwritable(path, error) from error
    return path
