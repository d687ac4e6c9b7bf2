"""How near the quantized detector comes to the float one, by MMDetection's COCO metric.

    python -m integration.bench.detector --split test --seeds 0,1,2

Float, plain PTQ (min-max ranges) and RepAPQ are scored on the same scenes in the same run; calibration takes
512 scenes made of training items. ``--split val`` (other items again) is for choosing, ``test`` for reporting.
Results go to ``results/detector.json`` after every run, and a run that is there already is not repeated.
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
from repapq_plugin.hosts.openmmlab.pipeline import Workbench, open_config

CONFIG = ROOT / "mm_configs" / "fashion" / "repapq_yolov6-n_w8a8_fashion.py"


@click.command()
@click.option("--preset", "presets", multiple=True, default=("w8a8", "w6a6", "w4a4"), help="Which bit widths.")
@click.option("--seeds", default="0,1,2", help="Seeds, separated by commas.")
@click.option("--split", type=click.Choice(["val", "test"]), default="val")
@click.option("--name", default="detector", help="Results go to results/<name>.json.")
@click.option("--set", "overrides", multiple=True, help="key=json, overrides a key of every RepAPQ run.")
@click.option("--checkpoint", help="Another float checkpoint than the shipped one.")
@click.option("--plain/--no-plain", default=True, help="Score plain PTQ too.")
def main(
    presets: tuple[str, ...],
    seeds: str,
    split: str,
    name: str,
    overrides: tuple[str, ...],
    checkpoint: str | None,
    plain: bool,
) -> None:
    """Quantize the reference detector at several bit widths and print one line per run."""
    logging.basicConfig(level=logging.WARNING)
    extra = {key: json.loads(value) for key, _, value in (item.partition("=") for item in overrides)}
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    done = {(row["method"], row["preset"], row["seed"], row["split"]) for row in rows}
    cfg = open_config(CONFIG)
    if split == "val":
        cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(cfg, checkpoint, Path(folder))
        float_score = bench.score(bench.model)["coco/bbox_mAP"]
        click.echo(f"float {float_score:.3f} on {split}")
        for preset in presets:
            config = bench.settings.quantizer.from_preset(preset)
            runs = [("plain PTQ", 0, config.plain())] if plain else []
            runs += [("RepAPQ", int(seed), config.replace(seed=int(seed), **extra)) for seed in seeds.split(",")]
            for method, seed, settings in runs:
                if (method, preset, seed, split) in done:
                    continue
                started = time.perf_counter()
                result = bench.calibrate(settings)
                seconds = round(time.perf_counter() - started, 1)
                metrics = bench.score(result.model)
                row = {
                    "method": method,
                    "preset": preset,
                    "seed": seed,
                    "split": split,
                    "float": float_score,
                    "mAP": metrics["coco/bbox_mAP"],
                    "mAP50": metrics["coco/bbox_mAP_50"],
                    "seconds": seconds,
                    "kept": sum(unit.kept for unit in result.units),
                    "units": len(result.units),
                    "scheme": settings.scheme,
                    "config": settings.to_dict(),
                }
                rows.append(row)
                click.echo(
                    f"{preset} {method:10s} seed {seed}: mAP {row['mAP']:.3f} mAP50 {row['mAP50']:.3f} ({seconds} s)"
                )
                write_result(name, {"environment": environment(), "rows": rows})
    for preset in presets:
        found = [
            row["mAP"] for row in rows if (row["preset"], row["method"], row["split"]) == (preset, "RepAPQ", split)
        ]
        if found:
            spread = f" ± {statistics.stdev(found):.4f}" if len(found) > 1 else ""
            click.echo(f"{preset}: float {float_score:.3f}, RepAPQ {statistics.mean(found):.4f}{spread}")


if __name__ == "__main__":
    main()
