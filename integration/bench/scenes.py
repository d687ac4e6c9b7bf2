"""How near the quantized networks for scenes come to the float ones, by the toolboxes' own metrics.

    python -m integration.bench.scenes --split test --model yolov6-n --model repvgg-fcn --model rtmdet-ins

Float, plain PTQ (min-max ranges) and RepAPQ are scored on the same scenes in the same run; calibration takes
512 scenes made of training items. The first seed is exported, too, and scored on onnxruntime and on OpenVINO.
``--split val`` (other items again) is for choosing, ``test`` for reporting. Results go to
``results/scenes.json`` after every run, and a run that is there already is not repeated.
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

from integration.bench.reference import RESULTS, ROOT, environment, write_result
from repapq_plugin import CalibrationResult
from repapq_plugin.export.openvino import layer_kernels
from repapq_plugin.hosts.openmmlab.settings import RUNTIME_FORMATS
from repapq_plugin.hosts.openmmlab.work import export_network, open_network
from repapq_plugin.hosts.openmmlab.workbench import Workbench, open_config

METRICS = {
    "yolov6-n": ("coco/bbox_mAP", "coco/bbox_mAP_50"),
    "rtmdet-ins": ("coco/bbox_mAP", "coco/segm_mAP"),
    "repvgg-fcn": ("mIoU", "aAcc"),
}
"""Which of a toolbox's metrics are kept, the most important first."""

REDUCED = "RepAPQ, reduce_range"


def open_bench(name: str, split: str, checkpoint: str | None, folder: Path) -> Workbench:
    """Open a reference network with the data of a split."""
    cfg = open_config(ROOT / "mm_configs" / "fashion" / f"repapq_{name}_w8a8_fashion.py")
    if split == "val":
        cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator
    return Workbench(cfg, checkpoint, folder)


def runtime_scores(bench: Workbench, result: CalibrationResult, metrics: tuple[str, ...]) -> dict[str, Any]:
    """Export ``result``, score it on both runtimes, and count OpenVINO's integer layers."""
    scores: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for backend, kind in RUNTIME_FORMATS.items():
            exported = export_network(result.model, bench.example, Path(folder) / "repapq", kind)
            network = open_network(exported.path, backend)
            found = bench.score(result.model, network)
            scores[backend] = {metric: float(found[metric]) for metric in metrics}
            if backend == "openvino":
                kernels = layer_kernels(network.compiled)
                scores["int8_layers"] = sum(kernel.endswith("I8") for kernel in kernels.values())
                scores["layers"] = len(kernels)
    return scores


@click.command()
@click.option("--model", "names", multiple=True, default=tuple(METRICS), help="Which networks.")
@click.option("--preset", "presets", multiple=True, default=("w8a8", "w6a6", "w4a4"), help="Which bit widths.")
@click.option("--seeds", default="0", help="Seeds, separated by commas.")
@click.option("--split", type=click.Choice(["val", "test"]), default="val")
@click.option("--name", default="scenes", help="Results go to results/<name>.json.")
@click.option("--set", "overrides", multiple=True, help="key=json, overrides a key of every RepAPQ run.")
@click.option("--checkpoint", help="Another float checkpoint than the shipped one.")
@click.option("--plain/--no-plain", default=True, help="Score plain PTQ too.")
def main(
    names: tuple[str, ...],
    presets: tuple[str, ...],
    seeds: str,
    split: str,
    name: str,
    overrides: tuple[str, ...],
    checkpoint: str | None,
    plain: bool,
) -> None:
    """Quantize reference networks at several bit widths and print one line per run."""
    logging.basicConfig(level=logging.WARNING)
    extra = {key: json.loads(value) for key, _, value in (item.partition("=") for item in overrides)}
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    keys = ("model", "method", "preset", "seed", "split")
    done = {tuple(row[key] for key in keys) for row in rows}
    chosen = [int(seed) for seed in seeds.split(",")]
    # One folder for all: the toolboxes go on logging to the first one of a process.
    with tempfile.TemporaryDirectory() as folder:
        for model_name in names:
            metrics = METRICS[model_name]
            bench = open_bench(model_name, split, checkpoint, Path(folder))
            scored = bench.score(bench.model)
            float_scores = {metric: float(scored[metric]) for metric in metrics}
            click.echo(f"{model_name}: float {float_scores} on {split}")
            for preset in presets:
                config = bench.settings.quantizer.from_preset(preset)
                runs = [("plain PTQ", 0, config.plain())] if plain else []
                runs += [("RepAPQ", seed, config.replace(seed=seed, **extra)) for seed in chosen]
                # What processors without VNNI need to compute the 8-bit layers exactly.
                runs.append((REDUCED, chosen[0], config.replace(seed=chosen[0], reduce_range=True, **extra)))
                for method, seed, settings in runs:
                    found = (model_name, method, preset, seed, split)
                    if found in done:
                        continue
                    started = time.perf_counter()
                    result = bench.calibrate(settings)
                    seconds = round(time.perf_counter() - started, 1)
                    scored = bench.score(result.model)
                    row: dict[str, Any] = {
                        **dict(zip(keys, found, strict=True)),
                        "float": float_scores,
                        "simulated": {metric: float(scored[metric]) for metric in metrics},
                        "seconds": seconds,
                        "kept": sum(unit.kept for unit in result.units),
                        "units": len(result.units),
                        "scheme": settings.scheme,
                        "config": settings.to_dict(),
                    }
                    if method != "plain PTQ" and seed == chosen[0]:
                        row |= runtime_scores(bench, result, metrics)
                    rows.append(row)
                    shown = {key: row[key] for key in ("simulated", *RUNTIME_FORMATS) if key in row}
                    click.echo(f"{preset} {method:10s} seed {seed}: {shown} ({seconds} s)")
                    write_result(name, {"environment": environment(), "rows": rows})
    _print_summary([row for row in rows if row["split"] == split])


def _print_summary(rows: list[dict[str, Any]]) -> None:
    for model_name, preset in dict.fromkeys((row["model"], row["preset"]) for row in rows):
        metric = METRICS[model_name][0]
        found = [row for row in rows if (row["model"], row["preset"], row["method"]) == (model_name, preset, "RepAPQ")]
        if found:
            scores = [row["simulated"][metric] for row in found]
            spread = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
            drop = statistics.mean(scores) - found[0]["float"][metric]
            click.echo(f"{model_name} {preset}: {metric} {statistics.mean(scores):.4f}{spread}, {drop:+.4f} from float")


if __name__ == "__main__":
    main()
