"""Methods side by side on a toolbox model: its network part is compared by the toolbox's own metric."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from repapq_plugin.comparison import Comparison, compare
from repapq_plugin.comparison.peers import PeerOptions
from repapq_plugin.comparison.subject import Runtime
from repapq_plugin.errors import HostError
from repapq_plugin.hosts.openmmlab.metrics import headlines
from repapq_plugin.hosts.openmmlab.network import TensorPath, preprocess, serving_points
from repapq_plugin.hosts.openmmlab.other_hosts import OWN
from repapq_plugin.hosts.openmmlab.steps import Step
from repapq_plugin.hosts.openmmlab.workbench import Workbench
from repapq_plugin.job import Progress

FOLDER = "comparison"
"""Folder inside the work folder that keeps the rows."""


def compare_on_bench(
    bench: Workbench,
    step: Step,
    methods: Sequence[str],
    seeds: Sequence[int],
    runtime: Runtime,
    *,
    latency: bool = True,
    peers: PeerOptions | None = None,
) -> tuple[Comparison, Path]:
    """Compare methods on a workbench's model; return the table and its folder.

    Args:
        bench: Holds the float model with its weights.
        step: Told about each step.
        methods: See `compare`.
        seeds: See `compare`.
        runtime: See `compare`.
        latency: See `compare`.
        peers: See `compare`.

    Raises:
        HostError: The config names another host, or the model has no network part that can be taken out.
        RepAPQError: See `compare`.
    """
    if bench.settings.host != OWN:
        raise HostError(
            f"quantizer.type={bench.settings.host!r} is not compared; leave it out, and name a peer with --peer."
        )
    serving_points(bench.model)
    with step("load_data", "Loading calibration images") as report, torch.no_grad():
        images = [preprocess(bench.model, batch)["inputs"] for batch in bench.batches]
        report(Progress("calibration images", len(images), len(images)))

    def score(network: nn.Module) -> dict[str, float]:
        return bench.score(bench.model, network)

    folder = bench.folder / FOLDER
    with step("score_float", "Scoring the float network"):
        shown = headlines(bench.score(bench.model))
    with step("compare", "Comparing methods") as report:
        table = compare(
            TensorPath(bench.model).eval(),
            images,
            score,
            bench.settings.quantizer,
            methods=methods,
            seeds=seeds,
            folder=folder,
            runtime=runtime,
            latency=latency,
            peers=peers,
            metrics=shown,
            progress=report,
        )
    return table, folder
