"""The figures of a page. In the colours of `PAGE` they follow it; in others they are images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from repapq_plugin.diagnosis.judge import ENOUGH, noise_of
from repapq_plugin.diagnosis.seen import SeenTensor
from repapq_plugin.diagnosis.table import MomentName, UnitDiagnosis
from repapq_plugin.method.unit_result import UnitResult
from repapq_plugin.report.page import Figure
from repapq_plugin.report.svg import LARGE, PAGE, SMALL, Colours, bare, finished, new_figure, style

WIDE, NARROW = 860, 290
"""Width in pixels of a figure that takes the whole width, and of one of several side by side."""

ROW = 19
"""Height of a unit's line."""

GLYPH = 6.6
"""Width of a letter of a large label, on average."""

BARS = 72
"""Of a histogram."""

MAP_COLOUR = (0.76, 0.35, 0.10)
"""Red, green and blue of a large value in a map; it is seen on light and on dark."""


@style()
def losses(units: Sequence[UnitResult], colours: Colours = PAGE) -> Figure:
    """Draw every unit's loss before and after, in call order; those undone are marked."""
    shown = [unit for unit in units if _positive(unit.loss_before) and _positive(unit.loss_after)]
    longest = max((len(unit.name) for unit in shown), default=0)
    left, top, bottom = min(20 + GLYPH * longest, WIDE * 0.45), 30, 34
    height = top + bottom + ROW * max(1, len(shown))
    figure = new_figure(WIDE, height)
    axes = figure.add_axes((left / WIDE, bottom / height, (WIDE - left - 20) / WIDE, (height - top - bottom) / height))
    bare(axes, colours, size=LARGE)
    places = np.arange(len(shown))
    for place, unit in enumerate(shown):
        axes.plot((unit.loss_before, unit.loss_after), (place, place), color=colours.line, linewidth=3, zorder=1)
    before, after = [unit.loss_before for unit in shown], [unit.loss_after for unit in shown]
    kept = np.array([unit.kept for unit in shown], dtype=bool)
    axes.scatter(
        before, places, s=26, facecolor=colours.card, edgecolor=colours.soft, linewidth=1.2, zorder=2, label="before"
    )
    if kept.any():
        axes.scatter(np.array(after)[kept], places[kept], s=28, color=colours.accent, zorder=3, label="after, kept")
    if not kept.all():
        axes.scatter(
            np.array(after)[~kept], places[~kept], s=34, marker="x", color=colours.other, zorder=3, label="undone"
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_yticks(places, [unit.name for unit in shown])
    axes.grid(axis="x", color=colours.line, linewidth=0.6, alpha=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("relative loss on held-out batches, logarithmic")
    legend = axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=LARGE, borderpad=0, handletextpad=0.3
    )
    for text in legend.get_texts():
        text.set_color(colours.ink)
    undone = int((~kept).sum())
    alt = f"Loss of {len(shown)} units before and after calibration; {undone} were undone."
    return Figure(finished(figure, colours), alt, wide=True)


@style()
def histogram(seen: SeenTensor, colours: Colours = PAGE) -> Figure:
    """Draw what a quantizer was given, logarithmic in counts, on the range that was chosen for it."""
    points, counts = (values.cpu().numpy() for values in seen.histogram.points())
    low, high = min(seen.low, float(points.min())), max(seen.high, float(points.max()))
    edges = np.linspace(low, high if high > low else low + 1, BARS + 1, dtype=np.float64)
    heights, _ = np.histogram(points, bins=edges, weights=counts)
    width, height = NARROW, 128
    figure = new_figure(width, height)
    axes = bare(figure.add_axes((0.02, 0.15, 0.96, 0.81)), colours)
    axes.axvspan(seen.low, seen.high, color=colours.accent, alpha=0.1, linewidth=0)
    middles = (edges[:-1] + edges[1:]) / 2
    inside = (middles >= seen.low - seen.step / 2) & (middles <= seen.high + seen.step / 2)
    floor = max(heights[heights > 0].min() / 2, 0.5) if heights.any() else 0.5
    for chosen, colour in ((inside, colours.accent), (~inside, colours.other)):
        if (heights * chosen).any():
            tops = np.where(chosen, np.maximum(heights, floor), floor)
            axes.stairs(tops, edges, baseline=floor, fill=True, color=colour, linewidth=0)
    for bound in (seen.low, seen.high):
        axes.axvline(bound, color=colours.ink, linewidth=0.9)
    axes.set_yscale("log")
    axes.set_yticks([])
    axes.minorticks_off()
    axes.set_xlim(edges[0] - (edges[-1] - edges[0]) * 0.02, edges[-1] + (edges[-1] - edges[0]) * 0.02)
    axes.set_xticks(*_ends(seen.low, seen.high, edges))
    for label in axes.get_xticklabels():  # at an end there is no room for half a number
        place = (label.get_position()[0] - edges[0]) / (edges[-1] - edges[0])
        label.set_horizontalalignment("left" if place < 0.05 else "right" if place > 0.95 else "center")
    said = f"{seen.name}, {seen.num_bits} bits: {seen.low:.3g} to {seen.high:.3g}, {share(seen.clipped)} outside"
    return Figure(finished(figure, colours), f"Histogram of the input of {said}", said)


@style()
def outlier_map(name: str, peaks: Tensor, samples: Sequence[str] = (), colours: Colours = PAGE) -> Figure:
    """Draw the largest value of each channel in each sample; what stands out is strong in colour.

    Args:
        name: Whose input it is.
        peaks: Float ``(channels, samples)``.
        samples: Names of the samples.
        colours: See `Colours`.
    """
    values = peaks.double().cpu().numpy()
    channels, count = values.shape
    width, height = WIDE, 300
    figure = new_figure(width, height)
    axes = bare(figure.add_axes((0.06, 0.14, 0.92, 0.82)), colours, left=True, size=LARGE)
    top = float(values.max()) or 1.0
    axes.imshow(
        _coloured(_coarse(values) / top),
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, count - 0.5, channels - 0.5, -0.5),
    )
    channel, sample = (int(place) for place in np.unravel_index(int(values.argmax()), values.shape))
    axes.plot(sample, channel, marker="o", markersize=9, markerfacecolor="none", markeredgecolor=colours.ink)
    axes.set_xlabel("sample")
    axes.set_ylabel("channel")
    axes.locator_params(integer=True)
    typical = float(np.median(values[values > 0])) if (values > 0).any() else 0.0
    called = f" ({samples[sample]})" if sample < len(samples) else ""
    said = (
        f"Input of {name}: channel {channel} reaches {top:.3g} in sample {sample}{called}; "
        f"half of all channels and samples stay below {typical:.3g}."
    )
    return Figure(finished(figure, colours), f"Map of {channels} channels by {count} samples. {said}", said, wide=True)


@style()
def moments(units: Sequence[UnitDiagnosis], colours: Colours = PAGE) -> Figure:
    """Draw the signal over noise of every unit's products, merged, conditioned and calibrated, in call order."""
    longest = max((len(unit.name) for unit in units), default=0)
    left, top, bottom = min(20 + GLYPH * longest, WIDE * 0.45), 30, 34
    height = top + bottom + ROW * max(1, len(units))
    figure = new_figure(WIDE, height)
    axes = figure.add_axes((left / WIDE, bottom / height, (WIDE - left - 20) / WIDE, (height - top - bottom) / height))
    bare(axes, colours, size=LARGE)
    axes.axvline(ENOUGH, color=colours.line, linewidth=1.2, zorder=0)
    for place, unit in enumerate(units):
        at = {name: noise_of(moment.inputs, moment.weights).snr for name, moment in unit.moments.items()}
        reached = {"merged": at.get("merged"), "conditioned": at.get("conditioned"), "calibrated": unit.snr}
        known = {name: snr for name, snr in reached.items() if snr is not None and math.isfinite(snr)}
        if len(known) > 1:
            axes.plot((min(known.values()), max(known.values())), (place, place), color=colours.line, linewidth=3)
        weak = known.get("calibrated", math.inf) < ENOUGH
        for name, snr in known.items():
            axes.scatter(snr, place, s=28, zorder=3, **_mark(name, weak, colours))
    for name, label in (("merged", "merged"), ("conditioned", "conditioned"), ("calibrated", "calibrated")):
        axes.scatter([], [], s=28, label=label, **_mark(name, False, colours))
    axes.scatter([], [], s=28, label=f"below {ENOUGH:.0f} dB", **_mark("calibrated", True, colours))
    axes.set_ylim(len(units) - 0.4, -0.6)
    axes.set_yticks(np.arange(len(units)), [unit.name for unit in units])
    axes.grid(axis="x", color=colours.line, linewidth=0.6, alpha=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("signal over noise of a unit's products, in dB")
    legend = axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=LARGE, borderpad=0, handletextpad=0.3
    )
    for text in legend.get_texts():
        text.set_color(colours.ink)
    return Figure(finished(figure, colours), f"Signal over noise of {len(units)} units at three moments.", wide=True)


def _mark(moment: str, weak: bool, colours: Colours) -> dict[str, Any]:
    """Return how a unit is marked at a moment."""
    if moment == "calibrated":
        return {"color": colours.other if weak else colours.accent}
    inside = colours.card if moment == "merged" else colours.soft
    return {"facecolor": inside, "edgecolor": colours.soft, "linewidth": 1.2}


@style()
def channel_profile(unit: UnitDiagnosis, colours: Colours = PAGE) -> Figure:
    """Draw the largest value of each channel in order of size, merged and conditioned, relative to the typical one."""
    figure = new_figure(NARROW, 150)
    axes = bare(figure.add_axes((0.1, 0.16, 0.87, 0.8)), colours, left=True)
    drawn: tuple[tuple[MomentName, str], ...] = (("merged", colours.other), ("conditioned", colours.accent))
    for name, colour in drawn:
        moment = unit.moments.get(name)
        if moment is None:
            continue
        maxima = np.sort(moment.inputs.by_channel.maximum.numpy())[::-1]
        typical = float(np.median(maxima[maxima > 0])) if (maxima > 0).any() else 1.0
        axes.plot(np.arange(len(maxima)), np.maximum(maxima / typical, 1e-3), color=colour, linewidth=1.6, label=name)
    axes.locator_params(axis="x", integer=True)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    for text in axes.legend(loc="upper right", frameon=False, fontsize=SMALL).get_texts():
        text.set_color(colours.ink)
    said = f"{unit.name}: largest values over the typical channel's"
    return Figure(finished(figure, colours), f"Channels in order of size. {said}", said)


def share(part: float) -> str:
    """Return a share in percent, as people read it."""
    if part == 0:
        return "nothing"
    return f"{100 * part:.2g} %" if part >= 1e-5 else "less than 0.001 %"


MOST_CELLS = 512
"""Of a map along one side: what is smaller than a pixel is not drawn by itself."""


def _coarse(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Let neighbours share a cell where there are too many; the largest value stays visible."""
    for axis in (0, 1):
        step = math.ceil(values.shape[axis] / MOST_CELLS)
        starts = np.arange(0, values.shape[axis], step)
        values = np.maximum.reduceat(values, starts, axis=axis)
    return values


def _coloured(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return one colour, the more opaque the larger the value: it works on light and on dark."""
    image = np.empty((*shares.shape, 4))
    image[..., :3] = MAP_COLOUR
    image[..., 3] = np.clip(shares, 0, 1) ** 0.7
    return image


def _ends(low: float, high: float, edges: NDArray[np.float64]) -> tuple[list[float], list[str]]:
    """Return ticks at the ends of the range and of the values, where there is room for their numbers."""
    apart = (edges[-1] - edges[0]) / 6
    ticks = [low, high]
    for place in (edges[0], edges[-1], 0.0):
        if all(abs(place - tick) > apart for tick in ticks) and edges[0] <= place <= edges[-1]:
            ticks.append(float(place))
    if high - low < apart:
        ticks.remove(low)
    return ticks, [f"{tick:.3g}".replace("-", "\N{MINUS SIGN}") for tick in ticks]


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0
