"""What a calibration found, on the toolboxes' own visualizer backends: files, TensorBoard, whatever a config names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from mmengine.runner import Runner
from numpy.typing import NDArray

from repapq_plugin.hosts.openmmlab.pages import few, seen_by
from repapq_plugin.hosts.openmmlab.steps import Quantization
from repapq_plugin.report.figures import histogram, losses, outlier_map
from repapq_plugin.report.pictures import pixels
from repapq_plugin.report.svg import LIGHT

PREFIX = "repapq"
"""What the names of scalars and images begin with."""

MOST_SHOWN = 3
"""Histograms and maps each (our choice)."""

Image = NDArray[np.uint8]


def show(runner: Runner, done: Quantization, batches: Sequence[object], metrics: Mapping[str, float]) -> None:
    """Hand scores, the losses of units and figures to the runner's visualizer.

    Scores are scalars of step 0. Losses are scalars whose step is the unit's place in call order. Figures are images.

    Args:
        runner: Holds the visualizer.
        done: The quantization.
        batches: Calibration batches.
        metrics: The toolbox's scores.
    """
    visualizer = runner.visualizer
    for name, score in metrics.items():
        visualizer.add_scalar(f"{PREFIX}/{name}", score)
    for place, unit in enumerate(done.quantized.result.units):
        for when, loss in (("before", unit.loss_before), ("after", unit.loss_after)):
            if math.isfinite(loss):
                visualizer.add_scalar(f"{PREFIX}/loss_{when}", loss, step=place)
    for name, image in _figures(runner, done, batches):
        visualizer.add_image(f"{PREFIX}_{name}", image)


def _figures(runner: Runner, done: Quantization, batches: Sequence[object]) -> Iterator[tuple[str, Image]]:
    result = done.quantized.result
    if result.units:
        yield "losses", pixels(losses(result.units, LIGHT))
    seen = seen_by(runner.model, result.model, few(batches))
    for it in sorted(seen, key=lambda it: -it.clipped)[:MOST_SHOWN]:
        yield f"activations_{it.name}", pixels(histogram(it, LIGHT))
    for it in sorted(seen, key=lambda it: -it.outlying)[:MOST_SHOWN]:
        yield f"outliers_{it.name}", pixels(outlier_map(it.name, it.by_sample, colours=LIGHT))
