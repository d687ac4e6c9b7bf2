"""`compare`: every method on one network, one scheme, one calibration set and one list of seeds."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from repapq_plugin.comparison.methods import chosen_methods
from repapq_plugin.comparison.own import own_tasks
from repapq_plugin.comparison.page import has_report, write_comparison
from repapq_plugin.comparison.peers import PeerOptions, peer_tasks
from repapq_plugin.comparison.plot import can_plot, plot_comparison
from repapq_plugin.comparison.subject import Runtime, Score, Subject
from repapq_plugin.comparison.table import TABLE_FILE, Comparison, Row
from repapq_plugin.comparison.tasks import Task, common_scheme
from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.fingerprints import differences
from repapq_plugin.core.progress import Report, counted
from repapq_plugin.errors import ConfigError, RepAPQError
from repapq_plugin.export.qdq_onnx import require_onnx

logger = logging.getLogger(__name__)

FLOAT = "float"
"""Name of the float network's row."""

PAGE_FILE = "comparison.html"
PICTURES = ("comparison.png", "comparison.svg")


def compare(
    model: nn.Module,
    batches: Iterable[Tensor],
    score: Score,
    config: RepAPQConfig | None = None,
    *,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    folder: str | Path | None = None,
    runtime: Runtime = "openvino",
    latency: bool = True,
    peers: PeerOptions | None = None,
    metrics: Mapping[str, str] | None = None,
    progress: Report | None = None,
) -> Comparison:
    """Run methods side by side and return one table.

    Each method is calibrated in a process of its own, whose memory and processor time are measured, and is scored by
    one metric: simulated, then exported on an integer runtime. One that fails loses none of the others: its row says
    why.

    Args:
        model: Any float network that takes one tensor, branched or merged; not changed.
        batches: Calibration batches, float ``(N, ...)``; the same for all methods.
        score: Returns the metrics of a network that takes one tensor; of each more is better.
        config: Says the scheme (bits, target, patterns of layers) and the number of steps; methods say the rest.
        methods: Short names of methods (`comparison.methods`), ``"ablations"`` or ``"all"``; default: all but the
            ablations.
        seeds: Seeds of the learning; a method that learns nothing has one row.
        folder: Keeps the table after each row, the networks and the pictures. A row that it holds is not made again,
            but one that failed is tried once more. ``None`` keeps nothing.
        runtime: What runs exported networks: ``"openvino"``, ``"onnxruntime"`` or ``"none"``.
        latency: Time them, in turns with the float network.
        peers: Other tools beside our methods (`comparison.peers`).
        metrics: Metrics that a table shows, and how they are called; default: the first three, by their own names.
        progress: Called as the work goes on.

    Raises:
        ConfigError: A value is not allowed; or the folder holds another comparison.
        ExportError: The table cannot be written, or a package for the runtime is missing.
    """
    wanted, others = chosen_methods(methods), peers or PeerOptions()
    _check_seeds(seeds)
    if runtime != "none" or others.chosen():
        require_onnx()
    with nullcontext(folder) if folder is not None else tempfile.TemporaryDirectory(prefix="repapq-compare-") as place:
        subject = Subject(model, list(batches), score, config or RepAPQConfig(), runtime, Path(place), latency)
        tasks = [*own_tasks(subject, wanted, seeds), *peer_tasks(subject, others, seeds)]
        return _compare(subject, tasks, metrics, progress)


def _compare(
    subject: Subject, tasks: Sequence[Task], metrics: Mapping[str, str] | None, progress: Report | None
) -> Comparison:
    table = _begun(subject, metrics)
    advance = counted("comparison", len(tasks) + 1, progress)
    if table.row(FLOAT, None) is None:
        table = table.with_row(_float_row(subject, table))
        table.save(subject.folder)
    advance(FLOAT)
    for task in tasks:
        known = table.row(task.method, task.seed)
        if known is None or (known.failed and not known.impossible):
            table = table.with_row(_made(task, subject))
            table.save(subject.folder)
        advance(task.title)
    if can_plot():
        for name in PICTURES:
            plot_comparison(table, subject.folder / name)
    if has_report():
        write_comparison(table, subject.folder / PAGE_FILE)
    return table


def _check_seeds(seeds: Sequence[int]) -> None:
    if not seeds or any(isinstance(seed, bool) or not isinstance(seed, int) or seed < 0 for seed in seeds):
        raise ConfigError(f"seeds={list(seeds)!r} is not allowed; give at least one whole number from 0.")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds={list(seeds)!r} is not allowed; name each seed once.")


def _begun(subject: Subject, metrics: Mapping[str, str] | None) -> Comparison:
    """Return the folder's table, or a new one with the float network's scores.

    Raises:
        ConfigError: The folder holds another comparison.
        ResultError: Its table cannot be read.
    """
    found = subject.fingerprint()
    if (subject.folder / TABLE_FILE).is_file():
        table = Comparison.load(subject.folder)
        different = differences(table.subject, found)
        if different:
            raise ConfigError(
                f"The folder {subject.folder} holds another comparison: {'; '.join(different)}. Choose another folder."
            )
        return table
    floats = subject.score(subject.merged)
    if not floats:
        raise ConfigError("score gives no finite number for the float network; nothing can be compared by it.")
    shown = metrics or {key: key for key in list(floats)[:3]}
    return Comparison(
        scheme=common_scheme(subject.scheme),
        calibration=subject.describe(),
        floats=floats,
        metrics={key: label for key, label in shown.items() if key in floats},
        subject=found,
        versions={"repapq-plugin": metadata.version("repapq-plugin"), "torch": torch.__version__},
        machine=subject.machine(),
    )


def _float_row(subject: Subject, table: Comparison) -> Row:
    found = subject.judge_float(table.floats)
    return Row(
        FLOAT,
        "float, merged",
        "torch",
        "float32",
        simulated=found.scores,
        runtime="" if subject.runtime == "none" else subject.runtime,
        weight_bits=32,
        activation_bits=32,
        size_bytes=found.size_bytes or None,
        packed_bytes=sum(4 * value.numel() for value in subject.merged.parameters()),
        latency_ms=found.latency_ms,
        float_ms=found.float_ms,
    )


def _made(task: Task, subject: Subject) -> Row:
    """Make a row; whatever goes wrong in it becomes its reason, since the other rows are not to be lost."""
    try:
        return task.make()
    except Exception as error:
        logger.warning("%s: %s: %s", task.title, type(error).__name__, error)
        said = str(error) if isinstance(error, RepAPQError) else f"{type(error).__name__}: {error}"
        return Row(task.method, task.title, "", common_scheme(subject.scheme), task.seed, failed=said)
