"""``repapq``: quantize, score and export a toolbox model from a config and a checkpoint.

Exit codes: 0 done; 1 something was wrong with the input or the machine (said in a few lines); 2 the command was not
understood; 130 interrupted, with nothing half written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from repapq_plugin.cli import texts
from repapq_plugin.cli.comparison import comparison
from repapq_plugin.cli.devices import accelerators
from repapq_plugin.cli.diagnose import diagnose
from repapq_plugin.cli.display import Display, show_diagnosis
from repapq_plugin.cli.lowering import lower
from repapq_plugin.cli.opening import Resumable, opened, resumable
from repapq_plugin.cli.options import (
    Calibrating,
    Common,
    PathArgument,
    calibrating_options,
    common_options,
    device_option,
    resumable_options,
)
from repapq_plugin.cli.results import evaluate, export
from repapq_plugin.cli.sensitivity import sensitivity
from repapq_plugin.cli.targets import report, target_list, target_page
from repapq_plugin.errors import RepAPQError
from repapq_plugin.targets import find_target


@click.group(help=texts.CLI_HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="repapq-plugin", prog_name="repapq")
def cli() -> None:
    """Post-training quantization for OpenMMLab configs."""


@cli.command(help=texts.QUANTIZE_HELP)
@click.argument("config", type=PathArgument)
@click.argument("checkpoint", required=False)
@calibrating_options
@resumable_options
@click.option("--seed", type=click.IntRange(min=0), help="Seed of samples and optimisation. [default: the config's]")
@click.option(
    "--export",
    "formats",
    help="What is written: onnx, openvino, both with a comma, or none. OpenVINO files are also scored and timed. "
    "[default: all that can be written: both; openvino with -q type=NNCF]",
)
@click.option(
    "--compare/--no-compare",
    default=True,
    show_default=True,
    help="Also score the float network and plain PTQ (min-max ranges, nothing learned) on the same data.",
)
@click.option(
    "--launcher",
    type=click.Choice(["none", "pytorch", "slurm", "mpi"]),
    default="none",
    show_default=True,
    help="What has started this command as one of several processes: torchrun, srun or mpirun.",
)
@click.option(
    "--report/--no-report",
    "with_report",
    default=None,
    help="Also write report.html. [default: where its packages are installed]",
)
@device_option
@common_options
def quantize(
    config: Path,
    checkpoint: str | None,
    calibrating: Calibrating,
    seed: int | None,
    formats: str | None,
    compare: bool,
    launcher: str,
    with_report: bool | None,
    device: str | None,
    cfg_options: tuple[str, ...],
    work_dir: Path | None,
    threads: int | None,
) -> None:
    """Quantize the model of a config and compare it with the float one."""
    from repapq_plugin.core.ranks import alone, world
    from repapq_plugin.export.openvino import require_openvino
    from repapq_plugin.export.qdq_onnx import require_onnx

    overrides = calibrating.overrides()
    kinds = None if formats is None else [name for name in formats.split(",") if name and name != "none"]
    # What is missing shall be noticed before the calibration, not after. OpenVINO reads what ONNX wrote.
    missing = without_report(with_report)
    if kinds is None or kinds:
        require_onnx()
    if kinds is None or "openvino" in kinds:
        require_openvino()
    overrides["export"] = True if kinds is None else kinds
    display, common = Display(), Common(cfg_options, work_dir, threads, device, launcher)
    with opened(display, config, common, checkpoint, overrides=overrides, seed=seed) as bench:
        # A host, which the package and its command must not load before they know that it is wanted.
        from repapq_plugin.hosts.openmmlab.steps import quantize_and_compare

        checkpoints = bench.settings.checkpoints(bench.folder)
        with resumable(checkpoints):
            done = quantize_and_compare(bench, display.step, compare=compare, threads=threads, checkpoints=checkpoints)
        done.record.seconds = dict(display.seconds)
        if world().rank == 0:
            if with_report is not False and not missing:
                from repapq_plugin.hosts.openmmlab.pages import write_page_of

                with display.step("report", "Writing the report"), alone():
                    done.record.add_file("report", write_page_of(bench, done, bench.folder))
            done.record.write(bench.folder)
        checkpoints.remove()
    display.comparison(done.record, [*done.notes, missing])


def without_report(wanted: bool | None) -> str:
    """Return why there will be no report, if a package for it is missing and nobody asked for one.

    Args:
        wanted: Whether it was asked for; ``None``: nobody said.

    Raises:
        ConfigError: It was asked for, and a package is missing.
    """
    from repapq_plugin.report import require_report

    try:
        if wanted is not False:
            require_report()
    except RepAPQError as error:
        if wanted:
            raise
        return str(error)
    return ""


cli.add_command(comparison)
cli.add_command(evaluate)
cli.add_command(export)
cli.add_command(diagnose)
cli.add_command(lower)
cli.add_command(sensitivity)


@cli.command(help=texts.TARGETS_HELP)
@click.argument("name", required=False)
def targets(name: str | None) -> None:
    """List the targets, or say all of one."""
    for line in target_list() if name is None else target_page(find_target(name)):
        click.echo(line)


@cli.command(help=texts.CHECK_HELP)
@click.argument("file", type=PathArgument)
@click.option("--target", "name", default="generic", show_default=True, help="Whose rules are tested.")
@click.option(
    "--shown", type=click.IntRange(min=1), default=5, show_default=True, help="Findings of a rule told in full."
)
def check(file: Path, name: str, shown: int) -> None:
    """Test the rules of a target on an ONNX file."""
    from repapq_plugin.export.check import check_onnx

    findings = check_onnx(file, target := find_target(name))
    for line in report(findings, target, shown):
        click.echo(line)
    if findings:
        raise click.exceptions.Exit(1)


@cli.command(help=texts.DOCTOR_HELP)
def doctor() -> None:
    """Look at the installed packages and judge them."""
    from repapq_plugin.cli.doctor import examine
    from repapq_plugin.evaluation.processor import how_sums_are_made

    diagnosis = examine()
    devices = accelerators() if "any PyTorch model" in diagnosis.works else {}
    show_diagnosis(diagnosis, how_sums_are_made(), devices)
    if not diagnosis.healthy:
        raise click.exceptions.Exit(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: Words after ``repapq``; ``None`` takes the process's own.
    """
    errors = Console(stderr=True, highlight=False)
    try:
        # A command that ends with a code of its own hands it back here.
        code = cli.main(args=arguments, prog_name="repapq", standalone_mode=False)
    except (KeyboardInterrupt, click.Abort) as error:
        errors.print("Interrupted. What was written is whole; nothing half written is left.")
        if isinstance(error, Resumable):
            errors.print(f"{error} Give the same command with --resume to go on.", markup=False, soft_wrap=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (RepAPQError, OSError) as error:
        errors.print(f"Error: {error}", markup=False, soft_wrap=True)
        return 1
    return code if isinstance(code, int) else 0
