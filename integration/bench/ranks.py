"""What several processes cost and gain: communication counted, results compared, and, on an idle machine, time.

    python -m integration.bench.ranks --counts            # bytes and calls of 1, 2 and 4 processes
    python -m integration.bench.ranks --equal             # two processes against one: learned tensors, then the score
    python -m integration.bench.ranks --times             # idle machine only: 1, 2 and 4 processes of one thread each

The narrow RepVGG on Fashion-MNIST; each rank has a part of each of the 16 calibration batches. Processes are real ones
over gloo. Whatever is measured goes into ``results/ranks.json``, and the rest of it stays.

The model: a ring all-reduce of ``S`` bytes over ``n`` ranks sends ``2 (n - 1) / n S`` bytes from each rank, in
``2 (n - 1)`` messages one after the other (Patarasuk and Yuan, Journal of Parallel and Distributed Computing 69, 2009).
A step's ``S`` is what was counted: it does not depend on ``n``.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file
from torch import Tensor

from integration.bench.reference import (
    RESULTS,
    accuracy,
    calibration_batches,
    environment,
    forward,
    images_and_labels,
    load_classifier,
    write_result,
)
from repapq_plugin import Progress, RepAPQConfig, quantize_model
from repapq_plugin.core import ranks
from repapq_plugin.core.ranks import traffic
from tests.support import ranked
from tests.support.comparing import difference

PROCESSES = (1, 2, 4)
MODELLED = (2, 4, 8, 16, 32, 64)
LINKS = {"10 Gbit/s Ethernet": (1.25e9, 50e-6), "200 Gbit/s InfiniBand": (25e9, 5e-6), "NVLink": (200e9, 3e-6)}
"""Bytes a second of a rank's link, and seconds until a message arrives; round figures of such links, not measured."""


def calibrate(
    rank: int,
    keys: dict[str, Any],
    report: Callable[[Progress], None] | None = None,
    folder: str | None = None,
    backwards: bool = False,
) -> Any:
    """Calibrate on this rank's part of each batch, its images in order or ``backwards``."""
    model, size = load_classifier("repvgg"), ranks.world().size
    mine = [batch[rank::size].clone() for batch in calibration_batches(model)]
    mine = [batch.flip(0) if backwards else batch for batch in mine]
    config = RepAPQConfig.from_preset(**keys)
    return quantize_model(model, mine, config, forward_fn=forward, progress=report, checkpoint_dir=folder)


def learned(rank: int, keys: dict[str, Any], folder: str, backwards: bool = False) -> dict[str, Tensor]:
    """Return all tensors as they were learned: a delivered weight lies on its grid, one step beside its neighbour."""
    calibrate(rank, keys, folder=folder, backwards=backwards)
    return {} if rank else load_file(max(Path(folder).glob("part-*.safetensors")))


def score(rank: int, keys: dict[str, Any]) -> float:
    """Return the accuracy of a calibrated network on the test images, in percent; rank 0 tests."""
    result, model = calibrate(rank, keys), load_classifier("repvgg")
    return 0.0 if rank else accuracy(result.model, *images_and_labels("test", "full", model))


def counts(rank: int, keys: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what this rank had given to collectives at each report of a calibration."""
    seen: list[dict[str, Any]] = []

    def report(progress: Progress) -> None:
        now = {"calls": dict(traffic.calls), "bytes": dict(traffic.sent)}
        seen.append({"phase": progress.phase, "part": progress.part, **now})

    calibrate(rank, keys, report)
    whole = {"calls": dict(traffic.calls), "bytes": dict(traffic.sent)}
    return [*seen, {"phase": "end", "part": "", **whole}]


def times(rank: int, keys: dict[str, Any]) -> dict[str, float]:
    """Return seconds of the search for ranges and of learning, without loading."""
    at: dict[str, list[float]] = {}
    calibrate(rank, keys, lambda progress: at.setdefault(progress.phase, []).append(time.perf_counter()))
    return {"ranges": at["ranges"][-1] - at["ranges"][0], "learning": at["calibration"][-1] - at["ranges"][-1]}


def grown(before: dict[str, Any], after: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Return calls and bytes of each kind between two moments."""
    return {
        what: {kind: count - before[what].get(kind, 0) for kind, count in after[what].items()}
        for what in ("calls", "bytes")
    }


def counted(size: int) -> dict[str, Any]:
    """Count the communication of a short calibration; a step, and all else of a part, do not depend on its length."""
    keys = {"preset": "w6a6", "steps": 3}
    seen = ranked.values(size, counts, keys)[0]
    by_phase = {phase: [each for each in seen if each["phase"] == phase] for phase in ("ranges", "calibration", "end")}
    ranges, learning, end = by_phase["ranges"], by_phase["calibration"], by_phase["end"][0]
    steps: dict[str, dict[str, dict[str, int]]] = {}
    for before, after in zip(learning, learning[1:], strict=False):
        if before["part"] == after["part"]:
            steps[after["part"]] = grown(before, after)
    nothing = {"calls": {}, "bytes": {}}
    return {
        "before ranges": grown(nothing, ranges[0]),
        "ranges": grown(ranges[0], ranges[-1]),
        "steps": steps,
        "whole": grown(nothing, end),
        "parts": len(steps),
        "steps of a part": keys["steps"],
    }


def modelled(size: float) -> list[dict[str, Any]]:
    """Return what a ring all-reduce of ``size`` bytes takes on 2 to 64 ranks: bytes that a rank sends, and seconds."""
    return [
        {
            "ranks": n,
            "sent": 2 * (n - 1) / n * size,
            "seconds": {name: 2 * (n - 1) * (size / n / speed + delay) for name, (speed, delay) in LINKS.items()},
        }
        for n in MODELLED
    ]


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    """Return the largest and the median difference over all tensors, each relative to its largest value."""
    found = sorted(
        difference({key: value}, {key: other[key]})
        for key, value in one.items()
        if value.is_floating_point() and value.numel()
    )
    return {"largest": found[-1], "median": found[len(found) // 2]}


def equal(steps: int) -> dict[str, Any]:
    """Return how far two processes end from one, and how far one does from itself with images in another order."""
    keys = {"preset": "w8a8", "schedule": "network", "steps": steps}
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two, tempfile.TemporaryDirectory() as b:
        alone, pair = ranked.values(1, learned, keys, one)[0], ranked.values(2, learned, keys, two)[0]
        control = ranked.values(1, learned, keys, b, True)[0]
    return {
        "steps": steps,
        "two processes": differences(alone, pair),
        "one, images of each batch in reverse order": differences(alone, control),
    }


@click.command()
@click.option("--counts", "count", is_flag=True, help="Count calls and bytes.")
@click.option("--equal", "compare", is_flag=True, help="Compare learned tensors after some steps.")
@click.option("--steps", default=10, show_default=True, help="Steps of that comparison.")
@click.option("--scores", is_flag=True, help="Compare scores of whole calibrations, three seeds.")
@click.option("--times", "clock", is_flag=True, help="Measure time; the machine must be idle. Under 6 minutes.")
@click.option("--preset", default="w4a4", show_default=True, help="Bits of the scores.")
def main(count: bool, compare: bool, steps: int, scores: bool, clock: bool, preset: str) -> None:
    """Measure what is asked for."""
    ranked.PRELOADED += ["mmpretrain.apis", "integration.bench.ranks"]
    path = RESULTS / "ranks.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def keep(key: str, value: object) -> None:
        found[key] = value
        write_result("ranks", {**found, "environment": environment()})

    if count:
        by_size = {str(size): counted(size) for size in PROCESSES}
        largest = max(sum(step["bytes"].values()) for step in by_size["2"]["steps"].values())
        keep("counts", by_size)
        keep("model", {"bytes": largest, "rows": modelled(largest), "links": LINKS})
    if compare:
        keep("equal", equal(steps))
    if scores:
        rows = []
        for size in (1, 2):
            for seed in range(3):
                top1 = ranked.values(size, score, {"preset": preset, "seed": seed})[0]
                rows.append({"processes": size, "seed": seed, "preset": preset, "accuracy": top1})
                click.echo(str(rows[-1]))
        keep("scores", rows)
    if clock:
        rows = []
        for repeat in range(2):
            for size in PROCESSES:
                taken = ranked.values(size, times, {"preset": "w6a6", "steps": 100})
                row = {key: max(each[key] for each in taken) for key in taken[0]}
                rows.append({"processes": size, "repeat": repeat, **row})
                click.echo(str(rows[-1]))
        keep("times", rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
