"""What a target's grid costs: symmetric activations against affine ones on all reference networks, and files' findings.

    python -m integration.bench.targets --split test --source full
    python -m integration.bench.targets --split test --source full --model yolov6-n --model repvgg-fcn

Every run quantizes the same float network with the same 512 calibration images and the defaults, once for each target,
exports it, runs the file on onnxruntime, and tests the rules of the target on it. ``executorch`` stands for all targets
with affine activations, which compute the same; only ``onnxruntime`` rounds more. ``--steps`` and ``--images`` make a
quick trial of it. Results go to ``results/targets.json`` after every run; a run that is there already is not repeated.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

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
from repapq_plugin import CalibrationResult, RepAPQConfig, quantize_model
from repapq_plugin.evaluation.runtimes import OnnxRuntimeNetwork
from repapq_plugin.export.check import check_onnx
from repapq_plugin.hosts.openmmlab.work import export_network
from repapq_plugin.hosts.openmmlab.workbench import Workbench

KEYS = ("model", "target", "preset", "method", "seed", "split", "source", "steps", "images")


@torch.no_grad()
def file_scores(result: CalibrationResult, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Export a result, score its file in onnxruntime, with exact products and in integers, and check it."""
    with tempfile.TemporaryDirectory() as folder:
        path = export_network(result.model, images[:1], Path(folder) / "model", "onnx", result.config.runs_on).path
        found: dict[str, Any] = {"findings": len(check_onnx(path, result.config.runs_on))}
        for arithmetic in ("exact", "integer"):
            network = OnnxRuntimeNetwork(path, threads=1, arithmetic=arithmetic)
            right = same = 0
            for batch, truth in zip(images.split(250), labels.split(250), strict=True):
                scores = network(batch)
                right += int((scores.argmax(1) == truth).sum())
                same += int((scores.argmax(1) == forward(result.model, batch).argmax(1)).sum())
            found[f"onnxruntime_{arithmetic}"] = 100 * right / len(labels)
            found[f"same_class_{arithmetic}"] = 100 * same / len(labels)
    return found


def measure_scenes(bench: Workbench, config: RepAPQConfig, metric: str) -> dict[str, Any]:
    """Quantize a detector or segmentor once and return what is worth keeping; scores are in percent."""
    started = time.perf_counter()
    result = bench.calibrate(config)
    seconds = round(time.perf_counter() - started, 1)
    with tempfile.TemporaryDirectory() as folder:
        written = export_network(result.model, bench.example, Path(folder) / "model", "onnx", config.runs_on)
        found = {"findings": len(check_onnx(written.path, config.runs_on))}
        network = OnnxRuntimeNetwork(written.path, arithmetic="integer")
        scores = {"accuracy": bench.score(result.model), "onnxruntime_integer": bench.score(result.model, network)}
    return {
        "seconds": seconds,
        "metric": metric,
        **{name: in_percent(found, metric) for name, found in scores.items()},
        "kept": sum(unit.kept for unit in result.units),
        "units": len(result.units),
        "skips": len(result.plan.skips),
        "outputs": len(result.plan.outputs),
        "scheme": config.scheme,
        "config": config.to_dict(),
        **found,
    }


def in_percent(scores: Mapping[str, float], metric: str) -> float:
    """Return a toolbox's metric in percent; it gives mAP as a share."""
    return float(scores[metric]) * (100 if metric.startswith("coco/") else 1)


def measure_classes(
    model: nn.Module, batches: list[Tensor], config: RepAPQConfig, images: Tensor, labels: Tensor
) -> dict[str, Any]:
    """Quantize once and return what is worth keeping."""
    started = time.perf_counter()
    result = quantize_model(model, batches, config, forward_fn=forward)
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "accuracy": accuracy(result.model, images, labels),
        "kept": sum(unit.kept for unit in result.units),
        "units": len(result.units),
        "skips": len(result.plan.skips),
        "outputs": len(result.plan.outputs),
        "scheme": config.scheme,
        "config": config.to_dict(),
        **file_scores(result, images, labels),
    }


@click.command()
@click.option("--model", "names", multiple=True, default=("repvgg", "mobileone"), help="Which networks.")
@click.option("--target", "targets", multiple=True, default=("executorch", "tensorrt"), help="Which targets.")
@click.option("--preset", "presets", multiple=True, default=("w8a8", "w6a6"), help="Which bits.")
@click.option("--method", "methods", multiple=True, default=("plain PTQ", "RepAPQ"), help="Learned, or ranges only.")
@click.option("--seed", default=0, show_default=True)
@click.option("--split", type=click.Choice(["val", "test"]), default="val")
@click.option("--source", type=click.Choice(["subset", "full"]), default="subset", show_default=True)
@click.option("--steps", type=int, help="Steps a stage. [default: the configuration's]")
@click.option("--images", "count", type=int, help="Scored images at most. [default: all]")
@click.option("--name", default="targets", help="Results go to results/<name>.json.")
def main(
    names: tuple[str, ...],
    targets: tuple[str, ...],
    presets: tuple[str, ...],
    methods: tuple[str, ...],
    seed: int,
    split: str,
    source: str,
    steps: int | None,
    count: int | None,
    name: str,
) -> None:
    """Score each target on both classifiers and print one line per run."""
    logging.basicConfig(level=logging.ERROR)
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    done = {tuple(row[key] for key in KEYS) for row in rows}
    for model_name in names:
        metric = METRICS.get(model_name, ("accuracy",))[0]
        if model_name in METRICS:
            bench = open_bench(model_name, split, None, Path(tempfile.gettempdir()) / "repapq_bench_targets")
            float_accuracy, size = in_percent(bench.score(bench.model), metric), 0
            run = partial(measure_scenes, bench, metric=metric)
        else:
            model = load_classifier(model_name)
            images, labels = (part[:count] for part in images_and_labels(split, source, model))
            float_accuracy, size = accuracy(model, images, labels), len(labels)
            run = partial(measure_classes, model, calibration_batches(model), images=images, labels=labels)
        click.echo(f"{model_name}: float {float_accuracy:.2f} {metric} on {split}")
        for preset in presets:
            for target in targets:
                for method in methods:
                    config = RepAPQConfig.from_preset(preset, target=target, seed=seed)
                    config = config.plain() if method == "plain PTQ" else config.replace(steps=steps or config.steps)
                    found = (model_name, target, preset, method, seed, split, source, config.steps, size)
                    if found in done:
                        continue
                    row = dict(zip(KEYS, found, strict=True)) | {"float": float_accuracy}
                    row |= run(config)
                    rows.append(row)
                    shown = " ".join(
                        f"{key} {row[key]}"
                        for key in ("onnxruntime_integer", "same_class_integer", "findings")
                        if key in row
                    )
                    click.echo(f"{preset} {target:10s} {method:9s}: {row['accuracy']:.2f} ({row['seconds']} s) {shown}")
                    write_result(name, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
