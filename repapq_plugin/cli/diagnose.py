"""``repapq diagnose``: why a model loses by quantization, and where an exported file parts from the simulation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from repapq_plugin.cli import texts
from repapq_plugin.cli.display import Display
from repapq_plugin.cli.opening import opened, resumable
from repapq_plugin.cli.options import Common, PathArgument, common_options, device_option, pairs
from repapq_plugin.errors import ConfigError

if TYPE_CHECKING:
    from repapq_plugin.diagnosis import Diagnosis
    from repapq_plugin.diagnosis.differences import LayerDifference

ROWS = 20
"""Lines of a table on the terminal; the page has all."""


@click.command(help=texts.DIAGNOSE_HELP)
@click.argument("config", type=PathArgument)
@click.argument("checkpoint", required=False)
@click.option("--preset", help="Bits and settings, as for quantize. [default: the config's, else w8a8]")
@click.option(
    "-q",
    "--quantizer",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of RepAPQConfig, as for quantize; steps=0 learns nothing and is quicker. Repeatable.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Seed of samples and optimisation. [default: the config's]")
@click.option("--calib-samples", type=int, help="Calibration images at most. [default: the config's, else 512]")
@click.option("--calib-dataloader", metavar="NAME", help="Dataloader of the config to take them from, as for quantize.")
@click.option(
    "--file",
    type=PathArgument,
    help="Instead, compare this .onnx file with the simulation, layer by layer, and name the first that differs.",
)
@click.option(
    "--result",
    type=PathArgument,
    help="With --file: the .safetensors that it was exported from. [default: repapq.safetensors beside it]",
)
@click.option("--trust-checkpoint", is_flag=True, help="Run what CHECKPOINT says where it holds more than plain data.")
@click.option("--checkpoint-dir", type=PathArgument, help="Folder that keeps what is finished of the calibration.")
@click.option("--resume", is_flag=True, help="Go on with what that folder keeps after an interruption.")
@device_option
@common_options
def diagnose(
    config: Path,
    checkpoint: str | None,
    preset: str | None,
    quantizer: tuple[str, ...],
    seed: int | None,
    calib_samples: int | None,
    calib_dataloader: str | None,
    file: Path | None,
    result: Path | None,
    trust_checkpoint: bool,
    checkpoint_dir: Path | None,
    resume: bool,
    device: str | None,
    cfg_options: tuple[str, ...],
    work_dir: Path | None,
    threads: int | None,
) -> None:
    """Find out why a model loses."""
    from repapq_plugin.report import require_report

    # What is not allowed shall be noticed before the work, not after.
    require_report()
    check_file(file, result)
    keys = pairs(quantizer, "--quantizer")
    if preset is not None:
        keys["preset"] = preset
    calibration = {"num_samples": calib_samples, "dataloader": calib_dataloader}
    overrides: dict[str, object] = {
        "quantizer": keys,
        "calibration": {key: value for key, value in calibration.items() if value is not None},
        **({"trust_checkpoint": True} if trust_checkpoint else {}),
        **({"checkpoint_dir": str(checkpoint_dir)} if checkpoint_dir is not None else {}),
        **({"resume": True} if resume else {}),
    }
    display, common = Display(), Common(cfg_options, work_dir, threads, device)
    with opened(
        display,
        config,
        common,
        checkpoint,
        overrides=overrides,
        seed=seed,
        need_scores=False,
        need_weights=file is None,
    ) as bench:
        # A host, which the package and its command must not load before they know that it is wanted.
        from repapq_plugin.hosts.openmmlab import diagnosing

        if file is not None:
            differences = diagnosing.compare_file(bench, file, result, display.step)
            files, table = [diagnosing.write_difference(bench, differences, file, bench.folder)], compared(differences)
            lines = diagnosing.said_of(differences, file)
        else:
            checkpoints = bench.settings.checkpoints(bench.folder)
            with resumable(checkpoints):
                found = diagnosing.diagnose_on_bench(bench, display.step, checkpoints)
            with display.step("report", "Writing the page"):
                files = diagnosing.write_diagnosis_of(bench, found, bench.folder)
            checkpoints.remove()
            table, lines = remedies(found), [f"note: {note}" for note in found.result.notes]
    display.table(table)
    for line in (*lines, *(f"wrote {path}" for path in files)):
        display.line(line)


def check_file(file: Path | None, result: Path | None) -> None:
    """Refuse a file that cannot be compared.

    Raises:
        ConfigError: It is no ONNX file, or there is a result without one.
    """
    if file is None and result is not None:
        raise ConfigError(f"--result {str(result)!r} is not allowed without --file, which was exported from it.")
    if file is not None and file.suffix != ".onnx":
        raise ConfigError(f"--file {file.name!r} is not allowed; give an .onnx file.")
    if file is not None and not file.is_file():
        raise ConfigError(f"--file {str(file)!r} does not exist.")


def remedies(diagnosis: Diagnosis) -> Table:
    """Return a table of the weakest units, what stands out in them, and what helps."""
    from repapq_plugin.report.diagnosis import CALLED

    table = Table(
        title=f"Weakest units, signal over noise in dB, on {diagnosis.samples} samples",
        caption=diagnosis.result.config.scheme,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("unit", overflow="fold")
    table.add_column("dB", justify="right")
    for heading in ("outlier channels (times the typical)", "remedy", "key"):
        table.add_column(heading, overflow="fold")
    for unit in diagnosis.weakest[:ROWS]:
        outliers = ", ".join(
            f"{outlier.channel} ({outlier.times:.3g}{'' if outlier.everywhere else ', few samples'})"
            for outlier in unit.outliers
        )
        todo = [remedy for remedy in unit.remedies if remedy.how]
        called, keys = (CALLED[remedy.name] for remedy in todo), (remedy.how for remedy in todo)
        table.add_row(unit.name, f"{unit.snr:.1f}", outliers, "\n".join(called), "\n".join(keys))
    if len(diagnosis.units) > ROWS:
        table.add_row(f"and {len(diagnosis.units) - ROWS} more")
    return table


def compared(differences: Sequence[LayerDifference]) -> Table:
    """Return a table of the layers that differ most by what they do themselves, in the order of the file."""
    worst = sorted(differences, key=lambda each: -each.own)[:ROWS]
    table = Table(title="Layers that differ most, relative to their largest value", title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("made in it", justify="right")
    table.add_column("arriving at it", justify="right")
    for each in (each for each in differences if each in worst):
        table.add_row(each.layer, f"{each.own:.2g}", f"{each.arriving:.2g}")
    return table
