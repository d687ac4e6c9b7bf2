"""``repapq sensitivity``: what each unit costs at each bit width, and the bits that fit a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from repapq_plugin.cli import texts
from repapq_plugin.cli.display import Display
from repapq_plugin.cli.opening import opened, resumable
from repapq_plugin.cli.options import (
    Calibrating,
    Common,
    PathArgument,
    calibrating_options,
    common_options,
    device_option,
    resumable_options,
)
from repapq_plugin.sensitivity.widths import EIGHT, WIDTHS, shown

if TYPE_CHECKING:
    from repapq_plugin.sensitivity import Assignment, Sensitivity

ROWS = 20
"""How many units are shown; all are in the file."""


@click.command(help=texts.SENSITIVITY_HELP)
@click.argument("config", type=PathArgument)
@click.argument("checkpoint", required=False)
@click.option(
    "--bits",
    help="Widths to choose from, with commas: 4 for weights and activations, or w4a8. [default: 3,4,5,6,8; with "
    "--keep-8bit the config's bits and 8]",
)
@click.option("--mean-bits", type=float, help="Budget: bits of a weight in the mean over all quantized weights.")
@click.option("--size-bytes", type=int, help="Budget: bytes of packed weights and of all that stays as it is.")
@click.option("--bit-operations", type=float, help="Budget: products of a sample times bits of both factors.")
@click.option("--keep-8bit", type=int, help="Budget: how many units may keep 8 bits.")
@calibrating_options
@resumable_options
@click.option("--seed", type=click.IntRange(min=0), help="Seed of the samples. [default: the config's]")
@click.option("--batches", type=int, default=4, show_default=True, help="Batches that outputs are compared on.")
@click.option(
    "--evaluations",
    type=int,
    default=0,
    show_default=True,
    help="Evaluations of the toolbox's metric, up to 10: of the float network, then of the most damaging units.",
)
@click.option("--plot", type=PathArgument, help="Draw it, as .svg or .png.")
@device_option
@common_options
def sensitivity(
    config: Path,
    checkpoint: str | None,
    bits: str | None,
    mean_bits: float | None,
    size_bytes: int | None,
    bit_operations: float | None,
    keep_8bit: int | None,
    calibrating: Calibrating,
    seed: int | None,
    batches: int,
    evaluations: int,
    plot: Path | None,
    device: str | None,
    cfg_options: tuple[str, ...],
    work_dir: Path | None,
    threads: int | None,
) -> None:
    """Measure units and choose their bits."""
    from repapq_plugin.sensitivity import Budget, choose_bits
    from repapq_plugin.sensitivity.plot import check_plot, plot_sensitivity

    # What is not allowed shall be noticed before the measuring, not after.
    overrides = calibrating.overrides()
    limits = {
        "mean_bits": mean_bits,
        "size_bytes": size_bytes,
        "bit_operations": bit_operations,
        "keep_8bit": keep_8bit,
    }
    asked = {key: value for key, value in limits.items() if value is not None}
    budget = Budget(mean_bits, size_bytes, bit_operations, keep_8bit) if asked else None
    if plot is not None:
        check_plot(plot)
    display, common = Display(), Common(cfg_options, work_dir, threads, device)
    with opened(
        display, config, common, checkpoint, overrides=overrides, seed=seed, need_scores=evaluations > 0
    ) as bench:
        # A host, which the package and its command must not load before they know that it is wanted.
        from repapq_plugin.hosts.openmmlab.mixed_precision import TABLE_FILE, measure_on_bench, write_bits

        given = bench.settings.quantizer
        default = (*WIDTHS,) if keep_8bit is None else (shown((given.weight_bits, given.activation_bits)), shown(EIGHT))
        widths = default if bits is None else [width for width in bits.split(",") if width.strip()]
        checkpoints = bench.settings.checkpoints(bench.folder)
        with resumable(checkpoints):
            measured = measure_on_bench(bench, display.step, widths, batches, evaluations, checkpoints)
        files, assignment = [measured.save(bench.folder / TABLE_FILE)], None
        if budget is not None:
            # Where no assignment fits, what was measured is kept for another budget.
            assignment = choose_bits(measured, budget)
            files += write_bits(bench.folder, config, bench.given, assignment, summary(assignment, asked))
        if plot is not None:
            files.append(plot_sensitivity(measured, plot, assignment))
        checkpoints.remove()
    display.table(ranked(measured, assignment))
    for note in measured.notes:
        display.line(f"note: {note}")
    if assignment is not None:
        display.line(summary(assignment, asked))
    for file in files:
        display.line(f"wrote {file}")


def summary(assignment: Assignment, asked: Mapping[str, float]) -> str:
    """Return one line about chosen bits."""
    snr = -10 * math.log10(assignment.noise) if assignment.noise > 0 else math.inf
    return (
        f"Least damage with {', '.join(f'{key}={value:.12g}' for key, value in asked.items())}: "
        f"{assignment.mean_bits:.4f} bits a weight, {assignment.size_bytes} bytes, "
        f"{assignment.bit_operations} bit operations, {snr:.1f} dB expected at the output"
    )


def ranked(sensitivity: Sensitivity, assignment: Assignment | None) -> Table:
    """Return a table of the units, the most damaging at the fewest bits first; what is chosen has a star."""
    from repapq_plugin.hosts.openmmlab.metrics import headlines

    units = sorted(sensitivity.units, key=lambda unit: -unit.options[0].noise)
    widths = list(dict.fromkeys(option.bits for unit in units for option in unit.options if not unit.pinned))
    labels = headlines(sensitivity.scores)
    scores = ", ".join(f"{label} {sensitivity.scores[key]:.4f}" for key, label in labels.items())
    table = Table(
        title="Signal to noise at the network's output in dB (relative mean absolute error), one unit quantized",
        caption=f"float: {scores}" if scores else None,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("unit")
    for heading in (*map(shown, widths), *(f"{label} at {shown(widths[0])}" for label in labels.values())):
        table.add_column(heading, justify="right")
    for unit in units[:ROWS]:
        cells = []
        for bits in widths:
            option = unit.at(bits)
            star = "*" if assignment is not None and assignment.bits[unit.name] == option.bits else ""
            at = f", {shown(option.bits)}" if unit.pinned else ""
            cells.append(
                f"{star}{option.snr:.1f} ({option.mae:.3f}{at})" if not unit.pinned or bits == widths[0] else ""
            )
        found = unit.options[0].scores
        cells += [f"{found[key]:.4f}" if key in found else "" for key in labels]
        table.add_row(unit.name, *cells)
    if len(units) > ROWS:
        table.add_row(f"and {len(units) - ROWS} more")
    return table
