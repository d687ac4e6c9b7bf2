"""Mixed precision for a toolbox model: measure its units on a workbench, and write the chosen bits as a config."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from mmengine.config import Config

from repapq_plugin.core.checkpoints import Checkpoints
from repapq_plugin.core.files import write_atomically
from repapq_plugin.errors import HostError
from repapq_plugin.hosts.openmmlab.network import run_batch
from repapq_plugin.hosts.openmmlab.other_hosts import OWN
from repapq_plugin.hosts.openmmlab.settings import said_of
from repapq_plugin.hosts.openmmlab.steps import Step
from repapq_plugin.hosts.openmmlab.workbench import Workbench
from repapq_plugin.job import Progress
from repapq_plugin.sensitivity import Assignment, Sensitivity
from repapq_plugin.sensitivity.measure import sensitivity_job

TABLE_FILE, CONFIG_FILE, BITS_FILE = "sensitivity.json", "mixed_precision.py", "layer_bits.json"
"""Files in a work folder: all figures; a config with the chosen bits; these bits alone."""


def measure_on_bench(
    bench: Workbench,
    step: Step,
    bits: Sequence[str],
    batches: int,
    evaluations: int,
    checkpoints: Checkpoints,
) -> Sensitivity:
    """Measure every unit of a workbench's model at each bit width.

    Args:
        bench: Holds the float model with its weights.
        step: Told about each step.
        bits: Widths that a unit can get.
        batches: How many calibration batches outputs are compared on.
        evaluations: How often the toolbox's metric is evaluated.
        checkpoints: Keeps each measurement.

    Raises:
        RepAPQError: See `measure_sensitivity`; or the config names another host.
    """
    if bench.settings.host != OWN:
        raise HostError(
            f"quantizer.type={bench.settings.host!r} is not measured; leave it out here, and use the bits there."
        )
    with step("load_data", "Loading calibration images") as report:
        images = len(bench.batches)
        report(Progress("calibration images", images, images))

    def score(model: torch.nn.Module) -> Mapping[str, float]:
        metrics = {key: float(value) for key, value in bench.score(model).items()}
        return {key: value for key, value in metrics.items() if math.isfinite(value)}

    with step("sensitivity", "Measuring units") as report, torch.enable_grad():
        job = sensitivity_job(
            bench.settings.quantizer,
            bits,
            batches,
            evaluations,
            score if evaluations else None,
            run_batch,
            report,
            checkpoints,
        )
        return job.run(bench.model, bench.batches)


def write_bits(folder: Path, source: Path, cfg: Config, assignment: Assignment, said: str) -> list[Path]:
    """Write chosen bits as a config on top of another one, and as JSON for ``-q layer_bits=`` and for Python.

    Args:
        folder: Takes the files.
        source: File of the config that was measured.
        cfg: What it says.
        assignment: The bits.
        said: One line about them.

    Raises:
        ExportError: A file cannot be written.
    """
    values, where = said_of(cfg)
    quantizer = values.get("quantizer")
    bits = {name: tuple(pair) for name, pair in assignment.layer_bits.items()}
    lines = [f"        {name!r}: {pair!r}," for name, pair in bits.items()]
    if isinstance(quantizer, Mapping) and quantizer.get("layer_bits"):
        lines.insert(0, "        '_delete_': True,  # the patterns of the config below are in these bits already")
    try:
        base = os.path.relpath(source.resolve(), folder.resolve())
    except ValueError:  # on another drive
        base = str(source.resolve())
    text = "\n".join(
        (
            f"# {said}",
            f"_base_ = [{Path(base).as_posix()!r}]",
            "",
            f"{where} = dict(quantizer=dict(",
            "    layer_bits={",
        )
        + (*lines, "    },", "))", "")
    )
    files = {CONFIG_FILE: text, BITS_FILE: json.dumps(bits) + "\n"}
    for name, content in files.items():
        write_atomically(folder / name, content.encode())
    return [folder / name for name in files]
