"""A picture of a comparison: two points for each method, simulated and in integers, beside the float network."""

from __future__ import annotations

import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from repapq_plugin.comparison.table import Comparison
from repapq_plugin.core.files import atomically, unwritable
from repapq_plugin.report.page import Figure
from repapq_plugin.report.svg import LIGHT, PAGE, Colours, bare, finished, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

FLOAT = "float"
"""Name of the float network's row."""

WIDE, ROW, FRAME = 860, 34, 120
"""In pixels: width of the picture, height of a method, and of all that is above and below."""

LABEL, TITLE = 46, 110
"""Letters of a line that names a method, and of one that says the scheme."""

KINDS = (("simulated", "o", 0.16), ("integer", "D", -0.16))
"""What is drawn of a method: name, marker, and how far from its place."""

DOTS = 160
"""Per inch, of a picture in pixels."""


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def chart(table: Comparison, colours: Colours = PAGE) -> Figure:
    """Return the picture for a page."""
    with style():
        shown = [summary.row.title for summary in table.summaries() if summary.seeds and summary.row.method != FLOAT]
        label = next(iter(table.metrics.values()))
        alt = f"{label} of {len(shown)} methods, simulated and in integers, beside the float network."
        return Figure(finished(_drawn(table, colours), colours), alt, wide=True)


def plot_comparison(table: Comparison, path: str | Path) -> Path:
    """Draw the first metric of every method: the mean over its seeds, with the standard deviation.

    Args:
        table: What was compared.
        path: ``.svg`` or ``.png``.

    Raises:
        ExportError: The file cannot be written.
    """
    path = Path(path)
    try:
        with atomically(path) as partial, style():
            figure = _drawn(table, LIGHT)
            figure.axes[0].set_title("\n".join(textwrap.wrap(table.scheme, TITLE)), color=LIGHT.soft, loc="left")
            figure.patch.set_facecolor(LIGHT.card)
            figure.savefig(partial, format=path.suffix[1:], dpi=DOTS)
    except OSError as error:
        raise unwritable(path, error) from error
    return path


def _drawn(table: Comparison, colours: Colours) -> Drawing:
    metric, label = next(iter(table.metrics.items()))
    found = [summary for summary in table.summaries() if summary.seeds and summary.row.method != FLOAT][::-1]
    figure = new_figure(WIDE, FRAME + ROW * max(1, len(found)))
    figure.set_layout_engine("constrained")
    axes = bare(figure.add_subplot(), colours)
    for (kind, marker, shift), colour in zip(KINDS, (colours.accent, colours.other), strict=True):
        scores = [(place + shift, getattr(each, kind).get(metric)) for place, each in enumerate(found)]
        seen = [(place, *score) for place, score in scores if score is not None]
        if seen:
            places, means, spreads = zip(*seen, strict=True)
            axes.errorbar(means, places, xerr=spreads, fmt=marker, color=colour, markersize=5, capsize=2, label=kind)
        for place, mean, _ in seen:
            where, text = (mean, place), f"{mean:.4g}"
            axes.annotate(text, where, (7, 0), textcoords="offset points", va="center", fontsize=7, color=colours.ink)
    float_score = table.floats[metric]
    axes.axvline(float_score, color=colours.ink, linewidth=1, linestyle="--", label=f"float {float_score:.4g}")
    names = ["\n".join(textwrap.wrap(each.row.title, LABEL)[:2]) for each in found]
    axes.set_yticks(range(len(found)), names, color=colours.ink)
    axes.set_ylim(-0.6, max(1, len(found)) - 0.4)
    axes.margins(x=0.1)
    axes.set_xlabel(label)
    _legend(figure, axes, colours)
    return figure


def _legend(figure: Drawing, axes: Axes, colours: Colours) -> None:
    legend = figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    for text in legend.get_texts():
        text.set_color(colours.ink)
