"""Mixed precision at the cost of uniform 5 bits: chosen by `repapq_plugin.sensitivity`, uniform, and drawn at random.

    python -m integration.bench.mixed_precision --split test

Every assignment has at most 5 bits a weight in the mean; one of the chosen ones has at most the bit operations of
uniform W5A5, too. All layers take part, the first and last ones as well. Each assignment is calibrated with the same
settings and data, or gets its ranges only (0 steps). The search never sees the metric; a few evaluations beside it show
what single units do to the score. Results go to ``results/mixed_precision.json`` after every run, and a run that is
there already is not repeated.
"""

from __future__ import annotations

import json
import logging
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from torch import nn

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
from integration.bench.scenes import METRICS, open_bench
from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.core.running import ForwardFn
from repapq_plugin.hosts.openmmlab.network import run_batch
from repapq_plugin.sensitivity import Assignment, Budget, Sensitivity, choose_bits, measure_sensitivity

UNIFORM = (5, 5)
DRAWS = 3
NAMES = {"yolov6-n": METRICS["yolov6-n"][0], "mobileone": "top-1"}
"""Networks, and the metric of each."""


@dataclass(frozen=True)
class Subject:
    """A float network with its data and its metric."""

    model: nn.Module
    batches: Sequence[object]
    forward: ForwardFn
    score: Callable[[nn.Module], dict[str, float]]


@contextmanager
def opened(name: str, split: str, folder: Path) -> Iterator[Subject]:
    """Open a reference network."""
    if name in METRICS:
        bench = open_bench(name, split, None, folder)

        def score(model: nn.Module) -> dict[str, float]:
            scored = bench.score(model)
            return {NAMES[name]: float(scored[NAMES[name]])}

        yield Subject(bench.model, bench.batches, run_batch, score)
        return
    model = load_classifier(name)
    images, labels = images_and_labels(split, "full", model)

    def top1(model: nn.Module) -> dict[str, float]:
        return {NAMES[name]: accuracy(model, images, labels)}

    yield Subject(model, calibration_batches(model), forward, top1)


def drawn(sensitivity: Sensitivity, seed: int, mean_bits: float) -> Assignment:
    """Return an assignment at random that fits a mean of bits and leaves no room for one more step up."""
    chance = random.Random(seed)
    choices = {unit.name: [option.bits for option in unit.options] for unit in sensitivity.units}
    steps = {name: chance.randrange(len(widths)) for name, widths in choices.items()}

    def made(steps: Mapping[str, int]) -> Assignment:
        return sensitivity.assignment({name: choices[name][step] for name, step in steps.items()})

    while made(steps).mean_bits > mean_bits:
        name = chance.choice([name for name, step in steps.items() if step])
        steps[name] -= 1
    left = list(steps)
    while left:
        name = chance.choice(left)
        higher = {**steps, name: steps[name] + 1}
        if higher[name] < len(choices[name]) and made(higher).mean_bits <= mean_bits:
            steps = higher
        else:
            left.remove(name)
    return made(steps)


def assignments(sensitivity: Sensitivity) -> dict[str, Assignment]:
    """Return what is compared, by name."""
    uniform = sensitivity.uniform(UNIFORM)
    both = Budget(mean_bits=uniform.mean_bits, bit_operations=uniform.bit_operations)
    return {
        "uniform": uniform,
        "chosen": choose_bits(sensitivity, Budget(mean_bits=uniform.mean_bits)),
        "chosen, operations too": choose_bits(sensitivity, both),
        **{f"random {draw + 1}": drawn(sensitivity, draw, uniform.mean_bits) for draw in range(DRAWS)},
    }


@click.command()
@click.option("--model", "names", multiple=True, default=tuple(NAMES), help="Which networks.")
@click.option("--steps", default="0,300", help="Optimisation steps of a stage, separated by commas.")
@click.option("--evaluations", default=5, help="Evaluations of the metric while units are measured.")
@click.option("--split", type=click.Choice(["val", "test"]), default="val")
@click.option("--name", "file", default="mixed_precision", help="Results go to results/<name>.json.")
def main(names: tuple[str, ...], steps: str, evaluations: int, split: str, file: str) -> None:
    """Measure, choose, calibrate, and print one line per run."""
    logging.basicConfig(level=logging.WARNING)
    path = RESULTS / f"{file}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": [], "search": {}}
    keys = ("model", "assignment", "steps", "split")
    done = {tuple(row[key] for key in keys) for row in found["rows"]}
    config = RepAPQConfig.from_preset("w5a5", first_last_bits=None)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            with opened(name, split, Path(folder)) as subject:
                started = time.perf_counter()
                sensitivity = measure_sensitivity(
                    subject.model,
                    subject.batches,
                    config,
                    evaluations=evaluations,
                    score=subject.score,
                    forward_fn=subject.forward,
                )
                seconds = round(time.perf_counter() - started, 1)
                click.echo(f"{name}: {len(sensitivity.units)} units measured in {seconds} s")
                found["search"][name] = {
                    "seconds": seconds,
                    "evaluations": evaluations,
                    "units": len(sensitivity.units),
                    "float": dict(sensitivity.scores),
                    "worst": [
                        {"unit": unit.name, "bits": option.bits, "snr": option.snr, "scores": dict(option.scores)}
                        for unit, option in sensitivity.ranking()
                        if option.scores
                    ],
                }
                for count in map(int, steps.split(",")):
                    for kind, assignment in assignments(sensitivity).items():
                        if (name, kind, count, split) in done:
                            continue
                        settings = config.replace(layer_bits=assignment.layer_bits, steps=count)
                        started = time.perf_counter()
                        result = quantize_model(subject.model, subject.batches, settings, forward_fn=subject.forward)
                        taken = round(time.perf_counter() - started, 1)
                        row = {
                            **dict(zip(keys, (name, kind, count, split), strict=True)),
                            "score": subject.score(result.model)[NAMES[name]],
                            "mean_bits": assignment.mean_bits,
                            "bit_operations": assignment.bit_operations,
                            "size_bytes": assignment.size_bytes,
                            "noise": assignment.noise,
                            "bits": {unit: list(bits) for unit, bits in assignment.bits.items()},
                            "seconds": taken,
                        }
                        found["rows"].append(row)
                        click.echo(
                            f"{name} {count} steps, {kind}: {row['score']:.4f} at {row['mean_bits']:.3f} bits, "
                            f"{row['bit_operations'] / 1e9:.3f} G bit operations, noise {row['noise']:.4g} ({taken} s)"
                        )
                        write_result(file, {"environment": environment(), "scheme": config.scheme, **found})


if __name__ == "__main__":
    main()
