"""Diagnosing a toolbox model on a workbench: its samples have names, and its images are shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from repapq_plugin.core.checkpoints import Checkpoints
from repapq_plugin.diagnosis import Diagnosis
from repapq_plugin.diagnosis.differences import LayerDifference
from repapq_plugin.diagnosis.measure import DiagnosisJob
from repapq_plugin.errors import HostError, ResultError
from repapq_plugin.evaluation.layer_differences import layer_differences
from repapq_plugin.hosts.openmmlab.network import TensorPath, run_batch
from repapq_plugin.hosts.openmmlab.other_hosts import OWN
from repapq_plugin.hosts.openmmlab.pictures import Image, names_in, raw_image
from repapq_plugin.hosts.openmmlab.record import machine, versions
from repapq_plugin.hosts.openmmlab.steps import Step, load_quantized
from repapq_plugin.hosts.openmmlab.work import RESULT_FILE
from repapq_plugin.hosts.openmmlab.workbench import Workbench
from repapq_plugin.job import Progress
from repapq_plugin.report import Page, difference_section, write_diagnosis, write_page
from repapq_plugin.report.parts import facts_section
from repapq_plugin.report.pictures import picture

DIAGNOSIS_FILE, PAGE_FILE = "diagnosis.json", "diagnosis.html"
"""Files in a work folder: all figures, and the page."""

MOST_PICTURES = 12
"""Samples that are shown (our choice)."""


def diagnose_on_bench(bench: Workbench, step: Step, checkpoints: Checkpoints) -> Diagnosis:
    """Diagnose the model of a workbench on its calibration data.

    Args:
        bench: Holds the float model with its weights.
        step: Told about each step.
        checkpoints: Keeps what is finished of the calibration.

    Raises:
        RepAPQError: See `diagnose`; or the config names another host.
    """
    if bench.settings.host != OWN:
        raise HostError(
            f"quantizer.type={bench.settings.host!r} is not diagnosed; leave it out here: what is found in ranges, "
            "channels and samples holds there, too."
        )
    with step("load_data", "Loading calibration images") as report:
        images = len(bench.batches)
        report(Progress("calibration images", images, images))
    with step("diagnose", "Diagnosing") as report, torch.enable_grad():
        job = DiagnosisJob(bench.settings.quantizer, run_batch, report, checkpoints)
        return job.run(bench.model, bench.batches)


def write_diagnosis_of(bench: Workbench, diagnosis: Diagnosis, folder: Path) -> list[Path]:
    """Write a diagnosis as JSON and as a page; return both files.

    Raises:
        ConfigError: A package is missing.
        ExportError: A file cannot be written.
    """
    names = names_in(bench.batches)
    rare = [outlier for unit in diagnosis.units for outlier in unit.outliers if not outlier.everywhere]
    causes = Counter(number for outlier in rare for number in outlier.samples)
    said = {number: f"{names[number]}: outlying in {count} channels" for number, count in causes.items()}
    images = _images(bench.batches, [number for number, _ in causes.most_common(MOST_PICTURES)])
    pictures = [picture(image, f"Sample {number}", said[number]) for number, image in images]
    page = write_diagnosis(
        diagnosis,
        folder / PAGE_FILE,
        title=_title(bench),
        samples=names,
        pictures=pictures,
        facts=_facts(bench),
    )
    return [diagnosis.save(folder / DIAGNOSIS_FILE), page]


def compare_file(bench: Workbench, file: Path, result: Path | None, step: Step) -> list[LayerDifference]:
    """Compare every layer of an exported file with the simulation of the result that it was made from.

    Args:
        bench: Holds the model of the config; its weights do not matter.
        file: ``.onnx`` file.
        result: What it was exported from; ``None``: ``repapq.safetensors`` beside it.
        step: Told about each step.

    Raises:
        ResultError: There is no such result, or it belongs to another model.
        ExportError: The file cannot be run.
    """
    source = result or file.with_name(RESULT_FILE)
    if not source.is_file():
        raise ResultError(f"{source} does not exist; say with --result which result {file.name} was exported from.")
    loaded = load_quantized(source, bench.model, lambda: bench.example)
    network = loaded.network if loaded.network is not None else TensorPath(loaded.model).eval()
    with step("compare", f"Comparing {file.name} layer by layer"):
        return layer_differences(network, file, bench.example)


def write_difference(bench: Workbench, differences: Sequence[LayerDifference], file: Path, folder: Path) -> Path:
    """Write the page of such a comparison.

    Raises:
        ConfigError: A package is missing.
        ExportError: The file cannot be written.
    """
    section = difference_section(differences, file.name)
    page = Page("Diagnosis", file.name, _title(bench), (), (section, facts_section(_facts(bench))))
    return write_page(page, folder / PAGE_FILE)


def said_of(differences: Sequence[LayerDifference], file: Path) -> list[str]:
    """Return what a comparison found, for a terminal."""
    return list(difference_section(differences, file.name).text)


def _images(batches: Sequence[object], numbers: Sequence[int]) -> list[tuple[int, Image]]:
    found: dict[int, Image] = {}
    first = 0
    for batch in batches:
        inputs = cast("Sequence[Tensor]", cast("Mapping[str, object]", batch)["inputs"])
        for number in numbers:
            if first <= number < first + len(inputs):
                found[number] = raw_image(inputs[number - first])
        first += len(inputs)
    return [(number, found[number]) for number in numbers if number in found]


def _title(bench: Workbench) -> str:
    return Path(str(getattr(bench.cfg, "filename", None) or "network")).stem


def _facts(bench: Workbench) -> dict[str, dict[str, object]]:
    return {
        "Files and data": {
            "config": str(getattr(bench.cfg, "filename", None) or ""),
            "checkpoint": str(bench.checkpoint or ""),
            "seed": bench.settings.quantizer.seed,
        },
        "Versions": dict(versions()),
        "Machine": machine(),
    }
