"""``repapq``: quantize, score and export a toolbox model from a config and a checkpoint.

Exit codes: 0 done; 1 something was wrong with the input or the machine (said in a few lines);
2 the command was not understood; 130 interrupted, with nothing half written.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from repapq_plugin.errors import ConfigError, HostError, RepAPQError

if TYPE_CHECKING:
    from repapq_plugin.hosts.openmmlab.workbench import Workbench
    from repapq_plugin.job import Progress
    from repapq_plugin.result import CalibrationResult

LOG_FILE = "repapq.log"
"""File in the work folder that takes what the toolbox and the libraries print."""

OFF_TERMINAL_WIDTH = 120

PathArgument = click.Path(path_type=Path)


CLI_HELP = """\
Post-training quantization of reparameterized networks (RepAPQ) for OpenMMLab configs.

\b
  repapq quantize CONFIG [CHECKPOINT]   float in, INT8 files and a comparison out
  repapq eval     CONFIG RESULT         score a result, simulated or on a runtime
  repapq export   CONFIG RESULT         write a result as ONNX or OpenVINO
  repapq doctor                         what is installed and works together

CONFIG is any mmdet, mmyolo, mmpretrain or mmseg config of a model with a training set and a test set. Scores are
always the toolbox's own metric on the config's test set.

Exit codes: 0 done, 1 wrong input or no room (said in a few lines), 2 command not understood, 130 interrupted (nothing
is left half written).
"""

QUANTIZE_HELP = """\
Quantize the model of CONFIG and compare it with the float one.

Loads CHECKPOINT (default: the config's load_from), merges the branches, calibrates, and writes to the work folder:

\b
  repapq.safetensors    the quantized network, for `repapq eval` and
                        `repapq export`
  repapq.onnx           QDQ ONNX: int8 weights, one Quantize/Dequantize
                        pair per quantized tensor
  repapq.xml, .bin      the same network for OpenVINO
  float.xml, .bin       the float network, merged, to compare with
  result.json           everything in the table, and more (below)
  repapq.log, toolbox/  what the toolbox printed and logged

\b
result.json holds:
  config, checkpoint    their paths
  scheme, settings      bits and ranges; all quantizer keys, seed,
                        calibration source and number of samples
  scores                all metrics of the toolbox, for float, plain_ptq,
                        repapq (simulated) and openvino
  size_bytes            of float, onnx and openvino
  latency               milliseconds for a batch of one on OpenVINO,
                        float and INT8 measured in turn
  kernels               kernel of each layer in OpenVINO's executed
                        graph; integer ones end in I8
  exports               operators, Quantize/Dequantize pairs, integer
                        layers, largest difference from torch
  calibration           per unit: stage, loss before and after, kept or
                        not, seconds; merged blocks and their largest
                        error; bits per layer; float layers and why
  files, seconds, versions, machine
"""


class _Display:
    """Bars on stderr while there is work, results on stdout."""

    def __init__(self) -> None:
        width = None if sys.stdout.isatty() else OFF_TERMINAL_WIDTH
        # Bound now: while a toolbox works, sys.stdout is the log file.
        self.out = Console(file=sys.stdout, width=width, highlight=False)
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
        )
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str, text: str) -> Iterator[Callable[[int, int], None]]:
        """Show one bar, and note how long it took under ``name``; yields ``report(done, total)``."""
        # On stdout, which is the log file for the time of the work.
        click.echo(f"{text} ...")
        task = self.bars.add_task(text, total=None)
        started = time.perf_counter()
        yield lambda done, total: self.bars.update(task, completed=done, total=total)
        self.seconds[name] = time.perf_counter() - started
        total = self.bars.tasks[task].total or 1
        self.bars.update(task, completed=total, total=total)

    @contextlib.contextmanager
    def calibration(self, name: str, text: str) -> Iterator[Callable[[Progress], None]]:
        """Show the bar of a calibration, whose phases are counted one after the other."""
        with self.step(name, text) as report:
            yield lambda progress: report(progress.done, progress.total)

    @contextlib.contextmanager
    def working(self, folder: Path) -> Iterator[None]:
        """Show bars, and send what toolboxes print to the work folder's log file."""
        with (folder / LOG_FILE).open("w", buffering=1) as log, self.bars, _into(log):
            yield


@contextlib.contextmanager
def _into(log: IO[str]) -> Iterator[None]:
    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: IO[str] | None = None,
        line: str | None = None,
    ) -> None:
        log.write(warnings.formatwarning(message, category, filename, lineno, line))

    handler = logging.StreamHandler(log)
    logger = logging.getLogger("repapq_plugin")
    logger.addHandler(handler)
    try:
        with contextlib.redirect_stdout(log), warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)


def _pairs(values: Sequence[str], option: str) -> dict[str, Any]:
    """Turn ``a.b=1`` into ``{"a": {"b": 1}}``."""
    result: dict[str, Any] = {}
    for value in values:
        path, equals, text = value.partition("=")
        if not equals or not path:
            raise ConfigError(f"{option} {value!r} is not allowed; write KEY=VALUE.")
        *parents, last = path.split(".")
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
        try:
            place[last] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            place[last] = text
    return result


def _config_options(function: Callable[..., None]) -> Callable[..., None]:
    """Options that every command takes."""
    for option in (
        click.option(
            "--cfg-options",
            multiple=True,
            metavar="KEY=VALUE",
            help="Override a key of the config, as the toolboxes' own tools do. Repeatable.",
        ),
        click.option(
            "-w",
            "--work-dir",
            type=PathArgument,
            help="Where files are written. [default: work_dirs/<config name>]",
        ),
        click.option(
            "--threads", type=click.IntRange(min=1), help="CPU threads for torch and OpenVINO. [default: all]"
        ),
    ):
        function = option(function)
    return function


@click.group(help=CLI_HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="repapq-plugin", prog_name="repapq")
def cli() -> None:
    """Post-training quantization for OpenMMLab configs."""


@cli.command(help=QUANTIZE_HELP)
@click.argument("config", type=PathArgument)
@click.argument("checkpoint", required=False)
@click.option("--preset", help="Bits: w8a8, w6a6, w4a4 or any other w<bits>a<bits>. [default: the config's, else w8a8]")
@click.option(
    "-q",
    "--quantizer",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of RepAPQConfig, for example steps=600 or learning_rates.weight=0.003. Repeatable.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Seed of samples and optimisation. [default: the config's]")
@click.option("--calib-samples", type=int, help="Calibration images at most. [default: the config's, else 512]")
@click.option(
    "--calib-dataloader",
    metavar="NAME",
    help="Dataloader of the config to calibrate from. [default: calib_dataloader if the config has one, else the "
    "training set with the test pipeline]",
)
@click.option(
    "--export",
    "formats",
    default="onnx,openvino",
    show_default=True,
    help="What is written: onnx, openvino, both with a comma, or none. OpenVINO files are also scored and timed.",
)
@click.option(
    "--compare/--no-compare",
    default=True,
    show_default=True,
    help="Also score the float network and plain PTQ (min-max ranges, nothing learned) on the same data.",
)
@_config_options
def quantize(
    config: Path,
    checkpoint: str | None,
    preset: str | None,
    quantizer: tuple[str, ...],
    seed: int | None,
    calib_samples: int | None,
    calib_dataloader: str | None,
    formats: str,
    compare: bool,
    **common: Any,
) -> None:
    """Quantize the model of a config and compare it with the float one."""
    from repapq_plugin.evaluation.processor import saturation_note
    from repapq_plugin.export.openvino import require_openvino
    from repapq_plugin.export.qdq_onnx import require_onnx
    from repapq_plugin.hosts.openmmlab.record import Record
    from repapq_plugin.hosts.openmmlab.work import (
        RESULT_FILE,
        compare_on_openvino,
        export_network,
        open_network,
    )

    overrides: dict[str, Any] = {"quantizer": _pairs(quantizer, "--quantizer")}
    if preset is not None:
        overrides["quantizer"]["preset"] = preset
    kinds = [name for name in formats.split(",") if name and name != "none"]
    # What is missing shall be noticed before the calibration, not after.
    if kinds:
        require_onnx()
    if "openvino" in kinds:
        require_openvino()
    overrides["export"] = kinds
    calibration = {"num_samples": calib_samples, "dataloader": calib_dataloader}
    overrides["calibration"] = {key: value for key, value in calibration.items() if value is not None}
    display = _Display()
    with _workbench(display, config, checkpoint, common, overrides=overrides, seed=seed) as bench:
        settings, folder = bench.settings, bench.folder
        with display.step("load_data", "Loading calibration images") as report:
            images = len(bench.batches)
            report(images, images)
        scores: dict[str, dict[str, float]] = {}
        if compare:
            with display.step("score_float", "Scoring the float network") as report:
                scores["float"] = bench.score(bench.model, report=report)
            with display.calibration("calibrate_plain_ptq", "Plain PTQ") as advance:
                plain = bench.calibrate(settings.quantizer.plain(), advance)
            with display.step("score_plain_ptq", "Scoring plain PTQ") as report:
                scores["plain_ptq"] = bench.score(plain.model, report=report)
            del plain
        with display.calibration("calibrate", "Calibrating RepAPQ") as advance:
            result = bench.calibrate(progress=advance)
        record = Record.start(bench.cfg, bench.checkpoint, settings, result)
        record.add_file("result", result.save(folder / RESULT_FILE))
        with display.step("score_repapq", "Scoring RepAPQ (simulated)") as report:
            scores["repapq"] = bench.score(result.model, report=report)
        for kind in settings.export:
            with display.step(f"export_{kind}", f"Exporting {kind}"):
                record.add_exported(kind, export_network(result.model, bench.example, folder / "repapq", kind))
        if "openvino" in settings.export:
            integer = Path(record.files["openvino"][0])
            with display.step("score_openvino", "Scoring OpenVINO INT8") as report:
                scores["openvino"] = bench.score(result.model, open_network(integer, "openvino"), report)
            with display.step("latency", "Measuring latency"):
                exported = export_network(bench.merged(), bench.example, folder / "float", "openvino")
                record.add_exported("float", exported)
                record.latency, record.kernels = compare_on_openvino(
                    {"float": exported.path, "openvino": integer}, bench.example, common["threads"]
                )
        for name, metrics in scores.items():
            record.add_scores(name, metrics)
        record.seconds = dict(display.seconds)
        record.write(folder)
        notes = list(result.notes)
        if "openvino" in scores:
            notes.append(saturation_note(result.config.reduce_range))
    _show(display.out, record, notes)


ROWS = {
    "float": "float",
    "plain_ptq": "plain PTQ (min-max), simulated",
    "repapq": "RepAPQ, simulated",
    "onnxruntime": "RepAPQ INT8, onnxruntime",
    "openvino": "RepAPQ INT8, OpenVINO",
}


def _show(out: Console, record: Any, notes: Sequence[str] = ()) -> None:
    from repapq_plugin.hosts.openmmlab.metrics import headlines
    from repapq_plugin.report.table import Row, comparison_table

    labels: dict[str, str] = {}
    for metrics in record.scores.values():
        labels.update(headlines(metrics))
    latency: Mapping[str, Any] = record.latency.get("median_ms", {})
    rows = [
        Row(
            text,
            {label: record.scores[name].get(key) for key, label in labels.items()},
            record.size_bytes.get(name),
            latency.get(name),
        )
        for name, text in ROWS.items()
        if name in record.scores
    ]
    out.print(comparison_table(rows, list(labels.values()), record.scheme, record.latency.get("how", "")))
    for note in filter(None, notes):
        out.print(f"note: {note}", markup=False)
    for name, paths in record.files.items():
        out.print(f"wrote {name}: {', '.join(paths)}", markup=False, soft_wrap=True)


@contextlib.contextmanager
def _workbench(
    display: _Display, config: Path, checkpoint: str | None, common: Mapping[str, Any], **arguments: Any
) -> Iterator[Workbench]:
    """Open config, model and work folder, with bars shown and the toolbox kept quiet until the end."""
    # Before the toolboxes are imported, which takes seconds.
    if not config.is_file():
        raise HostError(f"The config {config} does not exist.")
    import torch

    from repapq_plugin.hosts.openmmlab.work import writable_folder
    from repapq_plugin.hosts.openmmlab.workbench import Workbench, open_config

    if common["threads"] is not None:
        torch.set_num_threads(common["threads"])
    folder = writable_folder(common["work_dir"] or Path("work_dirs") / config.stem)
    with display.working(folder):
        with display.step("load_model", "Loading the model"):
            cfg = open_config(config, common["cfg_options"])
            bench = Workbench(cfg, checkpoint, folder, **arguments)
        yield bench


BACKEND_OF = {".safetensors": "simulated", ".onnx": "onnxruntime", ".xml": "openvino"}


@cli.command("eval")
@click.argument("config", type=PathArgument)
@click.argument("result", type=PathArgument)
@click.option(
    "--backend",
    type=click.Choice(("simulated", "onnxruntime", "openvino")),
    help="What runs the network part. [default: by the file: .safetensors simulated, .onnx onnxruntime, .xml openvino]",
)
@_config_options
def evaluate(config: Path, result: Path, backend: str | None, **common: Any) -> None:
    """Score RESULT with the toolbox's own metric on the test set of CONFIG.

    RESULT is a repapq.safetensors, or an exported .onnx or .xml. A runtime takes the network part of the model;
    preprocessing, decoding and the metric stay the toolbox's. A .safetensors scored on a runtime is exported to a
    temporary folder first.
    """
    from repapq_plugin.evaluation.processor import saturation_note
    from repapq_plugin.hosts.openmmlab.work import RUNTIME_FORMATS, export_network, open_network

    kind = _kind_of(result)
    backend = backend or kind
    if backend == "simulated" and kind != "simulated":
        raise ConfigError(f"--backend simulated needs a .safetensors result, not {result.name}.")
    display = _Display()
    with (
        tempfile.TemporaryDirectory() as temporary,
        _workbench(display, config, None, common, need_weights=False) as bench,
    ):
        model, network, note = bench.model, None, ""
        if kind == "simulated":
            loaded = _load(result, bench)
            model = loaded.model
            note = saturation_note(loaded.config.reduce_range) if backend == "openvino" else ""
        if backend != "simulated":
            path = result
            if kind == "simulated":
                with display.step("export", f"Exporting for {backend}"):
                    path = export_network(
                        model, bench.example, Path(temporary) / "repapq", RUNTIME_FORMATS[backend]
                    ).path
            network = open_network(path, backend)
        with display.step("score", f"Scoring {result.name} ({backend})") as report:
            metrics = bench.score(model, network, report)
    for key, value in metrics.items():
        display.out.print(f"{key}: {value}", markup=False)
    if note:
        display.out.print(f"note: {note}", markup=False)


@cli.command()
@click.argument("config", type=PathArgument)
@click.argument("result", type=PathArgument)
@click.option("--format", "kind", type=click.Choice(("onnx", "openvino")), default="onnx", show_default=True)
@click.option(
    "-o",
    "--out",
    type=PathArgument,
    help="File to write, .onnx or .xml. [default: repapq.onnx or .xml beside RESULT]",
)
@_config_options
def export(config: Path, result: Path, kind: str, out: Path | None, **common: Any) -> None:
    """Write RESULT (a repapq.safetensors) as QDQ ONNX or as OpenVINO IR.

    The file holds the network part of the model of CONFIG: prepared images in, raw outputs of the head out. Its image
    size is that of the config's calibration images; the batch size stays open.
    """
    from repapq_plugin.hosts.openmmlab.work import SUFFIXES, export_network

    if _kind_of(result) != "simulated":
        raise ConfigError(f"{result.name} is exported already; give the .safetensors result.")
    target = out or result.with_suffix(SUFFIXES[kind])
    if target.suffix != SUFFIXES[kind]:
        raise ConfigError(f"--out {target.name!r} is not allowed with --format {kind}; end it in {SUFFIXES[kind]}.")
    display = _Display()
    with _workbench(display, config, None, common, need_weights=False, need_scores=False) as bench:
        model = _load(result, bench).model
        with display.step("export", f"Exporting {kind}"):
            exported = export_network(model, bench.example, target.with_suffix(""), kind)
    for path in exported.files:
        display.out.print(f"wrote {path}", markup=False, soft_wrap=True)


DOCTOR_HELP = """\
Say what is installed, what of it works together, and what to do about the rest.

Exit codes: 0 all that is installed works together, 1 something of it does not.
"""


@cli.command(help=DOCTOR_HELP)
def doctor() -> None:
    """Look at the installed packages and judge them."""
    from rich.table import Table

    from repapq_plugin.cli.doctor import KNOWN, examine

    diagnosis = examine()
    out = Console(file=sys.stdout, width=None if sys.stdout.isatty() else OFF_TERMINAL_WIDTH, highlight=False)
    table = Table("package", "version", "distribution", "state")
    faulty = {problem.package for problem in diagnosis.problems}
    for name in KNOWN:
        package = diagnosis.packages.get(name)
        if package is None:
            table.add_row(name, "-", "-", "not installed")
            continue
        operators = "" if name != "mmcv" else "no operators" if package.operators else "with operators"
        state = "see below" if name in faulty else ", ".join(word for word in ("ok", operators) if word)
        table.add_row(name, package.version, ", ".join(package.distributions), state)
    out.print(table)
    if "torch" in diagnosis.packages and "torch" not in faulty:
        out.print(f"processor: {_processor()}", markup=False, soft_wrap=True)
    for feature in diagnosis.works:
        out.print(f"works: {feature}", markup=False)
    for feature, names in diagnosis.missing.items():
        absent = [name for name in names if name not in diagnosis.packages]
        remedies = dict.fromkeys(KNOWN[name] for name in absent)
        how = f" ({'; '.join(remedies)})" if remedies else ""
        out.print(f"not available: {feature}: {', '.join(names)} missing or faulty{how}", markup=False, soft_wrap=True)
    for text, remedy in dict.fromkeys((problem.text, problem.remedy) for problem in diagnosis.problems):
        out.print(f"problem: {text}\n  remedy: {remedy}", markup=False, soft_wrap=True)
    if not diagnosis.healthy:
        raise click.exceptions.Exit(1)


def _processor() -> str:
    from repapq_plugin.evaluation.processor import adds_in_16_bits

    if adds_in_16_bits():
        return "no VNNI; 8-bit sums can saturate in OpenVINO here, unless a network is quantized with reduce_range=True"
    return "computes sums of 8-bit products exactly"


def _kind_of(result: Path) -> str:
    if result.suffix not in BACKEND_OF:
        raise ConfigError(f"{result.name} is not a result; give a file ending in {', '.join(BACKEND_OF)}.")
    return BACKEND_OF[result.suffix]


def _load(result: Path, bench: Workbench) -> CalibrationResult:
    from repapq_plugin.result import CalibrationResult

    return CalibrationResult.load(result, bench.model)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: Words after ``repapq``; ``None`` takes the process's own.
    """
    errors = Console(stderr=True, highlight=False)
    try:
        # A command that ends with a code of its own hands it back here.
        code = cli.main(args=arguments, prog_name="repapq", standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        errors.print("Interrupted. What was written is whole; nothing half written is left.")
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (RepAPQError, OSError) as error:
        errors.print(f"Error: {error}", markup=False, soft_wrap=True)
        return 1
    return code if isinstance(code, int) else 0
