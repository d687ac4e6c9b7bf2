"""The page of a toolbox model's quantization: scores, sample names and pictures are the toolbox's own."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn

from repapq_plugin.diagnosis.seen import SeenTensor, observe_activations
from repapq_plugin.hosts.openmmlab.metrics import headlines
from repapq_plugin.hosts.openmmlab.network import TensorPath, preprocess, run_batch
from repapq_plugin.hosts.openmmlab.other_hosts import OWN
from repapq_plugin.hosts.openmmlab.pictures import names_in, predictions, side_by_side
from repapq_plugin.hosts.openmmlab.record import Record
from repapq_plugin.hosts.openmmlab.steps import Quantization
from repapq_plugin.hosts.openmmlab.workbench import Workbench
from repapq_plugin.report import Evidence, Figure, write_report
from repapq_plugin.report.pictures import picture
from repapq_plugin.report.table import Row

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
"""Name of the page in a work folder."""

OBSERVED = 32
"""Samples that activations are looked at on (our choice: a few seconds for a full-size network)."""

SCORED = {
    "float": "float",
    "plain_ptq": "plain PTQ (min-max), {how}",
    "repapq": "RepAPQ, {how}",
    "onnxruntime": "RepAPQ INT8, onnxruntime",
    "openvino": "RepAPQ INT8, OpenVINO",
}
"""Networks in the order of a table, by what was scored."""


def scored_rows(record: Record) -> tuple[list[Row], list[str]]:
    """Return what a record says of each network that was scored, and the headings of the scores."""
    labels: dict[str, str] = {}
    for metrics in record.scores.values():
        labels.update(headlines(metrics))
    latency, host = record.latency.get("median_ms", {}), record.settings["host"]
    rows = [
        Row(
            text.format(how="simulated" if host == OWN else f"by {host}"),
            {label: record.scores[name].get(key) for key, label in labels.items()},
            record.size_bytes.get(name),
            latency.get(name),
        )
        for name, text in SCORED.items()
        if name in record.scores
    ]
    return rows, list(labels.values())


def write_page_of(bench: Workbench, done: Quantization, folder: Path) -> Path:
    """Write the page of a quantization into a folder.

    Args:
        bench: Holds the float model, the data and the visualizer.
        done: The quantization with its record.
        folder: Takes ``report.html``.

    Raises:
        ConfigError: A package is missing.
        ExportError: The file cannot be written.
    """
    record, result = done.record, done.quantized.result
    batches = few(bench.batches)
    notes = [note for note in done.notes if note not in result.notes]
    pictures: list[Figure] = []
    try:
        networks = {"float": (bench.model, None), "quantized": (done.quantized.model, done.network_on("simulated"))}
        for name, images in predictions(bench.runner, networks, bench.example):
            said = f"What the float and the quantized network predict for {name}"
            pictures.append(picture(side_by_side(images), said, name))
    except Exception as error:  # A visualizer, or a data set, is anybody's code; a page does without pictures.
        logger.warning("No predictions are drawn", exc_info=True)
        notes.append(f"No predictions are drawn: {type(error).__name__}: {error}")
    rows, columns = scored_rows(record)
    evidence = Evidence(
        title=Path(record.config).stem or "Quantized network",
        rows=rows,
        columns=columns,
        caption=record.latency.get("how", ""),
        seen=seen_by(bench.model, result.model, batches),
        samples=names_in(batches),
        calibrated_on=names_in(bench.batches),
        pictures=pictures,
        facts={
            "Files and data": {
                "config": record.config,
                "checkpoint": record.checkpoint,
                "calibration samples": len(names_in(bench.batches)),
                "seed": bench.settings.quantizer.seed,
                "quantized by": record.settings["host"],
            },
            "Time of each step, in seconds": {name: round(seconds, 1) for name, seconds in record.seconds.items()},
            "Versions": record.versions,
            "Machine": record.machine,
        },
        notes=notes,
    )
    return write_report(result, folder / REPORT_FILE, evidence=evidence)


def few(batches: Sequence[object], samples: int = OBSERVED) -> list[object]:
    """Return the first batches, as many as it takes to hold so many samples."""
    chosen: list[object] = []
    for batch in batches:
        if len(names_in(chosen)) >= samples:
            break
        chosen.append(batch)
    return chosen


def seen_by(model: nn.Module, quantized: nn.Module, batches: Sequence[object]) -> list[SeenTensor]:
    """Return what the quantizers of a network are given: of a whole model, or of its network part."""
    if isinstance(quantized, TensorPath):
        return observe_activations(quantized, lambda batch: quantized(preprocess(model, batch)["inputs"]), batches)
    return observe_activations(quantized, partial(run_batch, quantized), batches)
