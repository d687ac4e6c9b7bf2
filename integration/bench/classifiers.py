"""What both reference classifiers score at 8, 6, 4 and 3 bits on all 10,000 test images, and on integer runtimes.

    python -m integration.bench.classifiers --split test --seeds 0,1,2

Float, plain PTQ (min-max ranges) and RepAPQ with its defaults quantize the same network with the same 512
calibration images of the shipped subset. The first seed is also exported and scored on onnxruntime and on
OpenVINO. Results go to ``results/classifiers.json`` after every run, and a run that is there already is not
repeated. ``--split val`` is for choosing.
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
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
from repapq_plugin import CalibrationResult, RepAPQConfig, quantize_model
from repapq_plugin.export.openvino import layer_kernels
from repapq_plugin.hosts.openmmlab.work import export_network, open_network


def runtime_scores(result: CalibrationResult, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Export ``result``, score it on both runtimes, and count OpenVINO's integer layers."""
    example = images[:1]
    scores: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, backend in (("onnx", "onnxruntime"), ("openvino", "openvino")):
            exported = export_network(result.model, example, Path(folder) / "repapq", kind)
            network = open_network(exported.path, backend)
            right = sum(
                int((network(batch).argmax(1) == truth).sum())
                for batch, truth in zip(images.split(250), labels.split(250), strict=True)
            )
            scores[backend] = 100 * right / len(labels)
            if backend == "openvino":
                kernels = layer_kernels(network.compiled)
                scores["int8_layers"] = sum(kernel.endswith("I8") for kernel in kernels.values())
                scores["layers"] = len(kernels)
    return scores


def measure(
    model: nn.Module, batches: list[Tensor], config: RepAPQConfig, images: Tensor, labels: Tensor, runtimes: bool
) -> dict[str, Any]:
    """Quantize once and return what is worth keeping."""
    started = time.perf_counter()
    result = quantize_model(model, batches, config, forward_fn=forward)
    row = {
        "seconds": round(time.perf_counter() - started, 1),
        "accuracy": accuracy(result.model, images, labels),
        "kept": sum(unit.kept for unit in result.units),
        "units": len(result.units),
        "scheme": config.scheme,
        "config": config.to_dict(),
    }
    return {**row, **(runtime_scores(result, images, labels) if runtimes else {})}


@click.command()
@click.option("--model", "names", multiple=True, default=("repvgg", "mobileone"), help="Which classifiers.")
@click.option("--preset", "presets", multiple=True, default=("w8a8", "w6a6", "w4a4", "w3a3"), help="Which bits.")
@click.option("--seeds", default="0,1,2", help="Seeds, separated by commas.")
@click.option("--split", type=click.Choice(["val", "test"]), default="val")
@click.option("--name", default="classifiers", help="Results go to results/<name>.json.")
def main(names: tuple[str, ...], presets: tuple[str, ...], seeds: str, split: str, name: str) -> None:
    """Score both classifiers and print one line per run."""
    logging.basicConfig(level=logging.WARNING)
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    keys = ("model", "method", "preset", "seed", "split")
    done = {tuple(row[key] for key in keys) for row in rows}
    chosen = [int(seed) for seed in seeds.split(",")]
    for model_name in names:
        model = load_classifier(model_name)
        images, labels = images_and_labels(split, "full", model)
        batches = calibration_batches(model)
        float_accuracy = accuracy(model, images, labels)
        click.echo(f"{model_name}: float {float_accuracy:.2f} on {split}")
        for preset in presets:
            config = RepAPQConfig.from_preset(preset)
            runs = [("plain PTQ", 0, config.plain())]
            runs += [("RepAPQ", seed, config.replace(seed=seed)) for seed in chosen]
            for method, seed, settings in runs:
                found = (model_name, method, preset, seed, split)
                if found in done:
                    continue
                runtimes = method == "RepAPQ" and seed == chosen[0]
                row = dict(zip(keys, found, strict=True)) | {"float": float_accuracy}
                row |= measure(model, batches, settings, images, labels, runtimes)
                rows.append(row)
                shown = {key: row[key] for key in ("onnxruntime", "openvino", "int8_layers", "layers") if key in row}
                click.echo(f"{preset} {method:10s} seed {seed}: {row['accuracy']:.2f}  ({row['seconds']} s) {shown}")
                write_result(name, {"environment": environment(), "rows": rows})
            scores = [
                row["accuracy"]
                for row in rows
                if (row["model"], row["method"], row["preset"], row["split"]) == (model_name, "RepAPQ", preset, split)
            ]
            spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
            drop = statistics.mean(scores) - float_accuracy
            click.echo(f"{model_name} {preset}: {statistics.mean(scores):.2f}{spread}, {drop:+.2f} from float")


if __name__ == "__main__":
    main()
