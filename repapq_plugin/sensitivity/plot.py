"""A picture of a sensitivity: units ranked by their damage, a bar for each width, the chosen ones marked."""

from __future__ import annotations

from pathlib import Path

from repapq_plugin.core.files import atomically, unwritable
from repapq_plugin.errors import ConfigError
from repapq_plugin.sensitivity.table import Assignment, Sensitivity
from repapq_plugin.sensitivity.widths import shown

SUFFIXES = (".svg", ".png")
BAR, GAP = 0.06, 0.1
"""Height of a bar, and what lies between two units, in inches."""


def check_plot(path: str | Path) -> None:
    """Refuse what cannot be plotted, before any work is done.

    Raises:
        ConfigError: The suffix is unknown, or matplotlib is missing.
    """
    if Path(path).suffix not in SUFFIXES:
        raise ConfigError(f"plot={str(path)!r} is not allowed; end it in {' or '.join(SUFFIXES)}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("A plot needs matplotlib: pip install 'repapq-plugin[sensitivity]'") from error


def plot_sensitivity(sensitivity: Sensitivity, path: str | Path, assignment: Assignment | None = None) -> Path:
    """Draw ranked bars: noise at the network's output, units of the most damage at the fewest bits on top.

    Args:
        sensitivity: What was measured.
        path: ``.svg`` or ``.png``.
        assignment: Bits whose bars are marked.

    Raises:
        ConfigError: See `check_plot`.
        ExportError: The file cannot be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    units = sorted(sensitivity.units, key=lambda unit: unit.options[0].noise)
    widths = sorted({option.bits for unit in units for option in unit.options}, key=lambda bits: bits[0] * bits[1])
    tall = sum(len(unit.options) * BAR + GAP for unit in units)
    figure = Figure(figsize=(9, 1.5 + tall), layout="constrained")
    axes = figure.add_subplot()
    place, ticks = 0.0, list[float]()
    for unit in units:
        first = place
        for option in reversed(unit.options):
            chosen = assignment is not None and assignment.bits.get(unit.name) == option.bits
            axes.barh(
                place,
                max(option.noise, 1e-12),
                BAR,
                color=f"C{widths.index(option.bits) % 10}",
                edgecolor="black" if chosen else "none",
                hatch="////" if chosen else None,
            )
            place += BAR
        ticks.append((first + place - BAR) / 2)
        place += GAP
    axes.set_yticks(ticks, [unit.name for unit in units], fontsize=7)
    axes.set_ylim(-GAP, place)
    axes.set_xscale("log")
    axes.set_xlabel("noise at the network's output, one unit quantized" + (" (hatched: chosen)" if assignment else ""))
    colours = [Patch(color=f"C{index % 10}", label=shown(bits)) for index, bits in enumerate(widths)]
    axes.legend(handles=colours, loc="lower right")
    try:
        with atomically(Path(path)) as partial:
            figure.savefig(partial, format=Path(path).suffix[1:])
    except OSError as error:
        raise unwritable(Path(path), error) from error
    return Path(path)
