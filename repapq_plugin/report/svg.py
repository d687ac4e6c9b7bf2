"""A matplotlib figure as an ``<svg>`` element whose colours are the page's, be it light or dark."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Colours:
    """What a figure is drawn in, each as ``#rrggbb``.

    Args:
        ink: Of text and of what is exact.
        soft: Of labels.
        line: Of frames.
        accent: Of what the figure is about.
        other: Of what stands out.
        card: Of what lies behind.
    """

    ink: str
    soft: str
    line: str
    accent: str
    other: str
    card: str


PAGE = Colours("#010101", "#020202", "#030303", "#040404", "#050505", "#060606")
"""Each stands for the variable of its name in the page's style sheet."""

LIGHT = Colours("#1b1f24", "#5c6570", "#e4e5e3", "#2457c5", "#b4530f", "#ffffff")
"""The page's, on white."""

SMALL, LARGE = 9, 11
"""Pixels of text in a figure of several side by side, and in one that takes the whole width."""

POINTS = 72
"""Of an inch, in which matplotlib measures."""

_HEAD = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_SIZE = re.compile(r' (width|height)="[^"]*"')
_GROUP_ID = re.compile(r'<g id="[^"]*"')
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
_FONT = re.compile(r"font-family: [^;\"]*;? ?")
_SHORT_FONT = re.compile(r"font: ([\d.]+)px [^;\"]*")


@contextmanager
def style() -> Iterator[None]:
    """Measure text with the font that comes with matplotlib, and leave it text, to be shown in the page's own.

    A figure is made, filled and written inside.
    """
    from matplotlib import rc_context

    with rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "repapq",  # equal figures get equal names inside
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
            "font.size": SMALL,
            "axes.linewidth": 0.8,
            "text.parse_math": False,  # names may hold a dollar sign
        }
    ):
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure; sizes in pixels of the page at full width."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / POINTS, height / POINTS), dpi=POINTS)


def bare(axes: Axes, colours: Colours, *, left: bool = False, size: float = SMALL) -> Axes:
    """Leave of an axes' frame the line below, and the left one if asked for; draw it in these colours."""
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom" or (left and side == "left"))
        spine.set_color(colours.line)
    axes.set_facecolor("none")
    axes.tick_params(colors=colours.soft, length=0, pad=4, labelsize=size)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(colours.soft)
        label.set_fontsize(size)
    return axes


def to_svg(figure: Figure) -> str:
    """Return a figure in the colours of `PAGE` as an element that takes the width and the colours of its page."""
    figure.patch.set_visible(False)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = _METADATA.sub("", _HEAD.sub("", stream.getvalue()))
    head, rest = text[: text.index(">") + 1], text[text.index(">") + 1 :]
    head = _SIZE.sub("", head).replace("<svg", '<svg aria-hidden="true"', 1)
    text = _GROUP_ID.sub("<g", head + rest)
    text = _SHORT_FONT.sub(r"font-size: \1px", _FONT.sub("", text))  # versions write the one or the other
    for name, colour in vars(PAGE).items():
        text = text.replace(colour, f"var(--{name})")
    return text.strip()


def to_png(figure: Figure, scale: float = 2) -> str:
    """Return a figure as a ``data:`` address of a PNG image on white.

    Args:
        figure: Drawn in the colours of `LIGHT`.
        scale: Pixels of the image for one of the figure.
    """
    figure.patch.set_facecolor(LIGHT.card)
    stream = io.BytesIO()
    with style():
        figure.savefig(stream, format="png", dpi=POINTS * scale)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def finished(figure: Figure, colours: Colours) -> str:
    """Return a figure as a page takes it: a drawing that follows the page, or in other colours an image."""
    return to_svg(figure) if colours == PAGE else to_png(figure)
