"""What each idea is worth: loss, affine layer, stage term, schedule, at few bits on both classifiers.

    python -m integration.bench.ablation --model repvgg --split test --source subset --seeds 0,1,2

Every run quantizes the same float network with the same 512 calibration images of the shipped subset;
only the order in which batches are drawn depends on the seed. All methods get the same number of steps, by
default a third of what the plugin takes by itself. ``--split val`` is for choosing, ``test`` for reporting;
``--source subset`` scores the 2,000 test images that ship, ``full`` all 10,000. Results go to
``results/ablation-<model>.json`` after every run, and a run that is there already is not repeated.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import click
import torch

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
from repapq_plugin import RepAPQConfig, quantize_model

METHODS: dict[str, dict[str, Any]] = {
    "ranges only, min-max": {
        "steps": 0,
        "fold_constants": False,
        "equalize": False,
        "activation_observer": "min_max",
        "weight_observer": "min_max",
    },
    "ranges only, MSE": {"steps": 0, "activation_observer": "mse", "weight_observer": "mse"},
    "ranges only, MAE": {"steps": 0, "activation_observer": "mae", "weight_observer": "mse"},
    "stage, MSE": {"loss": "mse", "affine": False, "stage_weight": 0.0},
    "stage, MAE": {"loss": "mae", "affine": False, "stage_weight": 0.0},
    "stage, MSE + affine": {"loss": "mse", "affine": True, "stage_weight": 0.0},
    "stage, MAE + affine": {"loss": "mae", "affine": True, "stage_weight": 0.0},
    "stage, MSE + stage term": {"loss": "mse", "affine": False, "stage_weight": 1.0},
    "stage, MSE + affine + stage term": {"loss": "mse", "affine": True, "stage_weight": 1.0},
    "stage, MAE + affine + stage term": {"loss": "mae", "affine": True, "stage_weight": 1.0},
    "stage, MSE + affine + stage term, not equalized": {"equalize": False},
    "stage, MSE + affine + stage term, nothing prepared": {"equalize": False, "fold_constants": False},
    "unit, MSE + affine": {"loss": "mse", "affine": True, "stage_weight": 0.0, "schedule": "unit"},
    "unit, MSE + affine + stage term": {"loss": "mse", "affine": True, "stage_weight": 1.0, "schedule": "unit"},
    "network, MSE + affine": {"loss": "mse", "affine": True, "schedule": "network"},
}
UNIT_SHARE = 0.4
"""Share of the steps that a unit gets, so that unit by unit and a stage at once take about the same time."""


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what identifies a run."""
    return row["method"], row["preset"], row["seed"], row["split"], row["source"]


@click.command()
@click.option("--model", "names", multiple=True, default=("repvgg", "mobileone"), help="Which classifiers.")
@click.option("--preset", "presets", multiple=True, default=("w4a4", "w3a3", "w2a4"), help="Which bit widths.")
@click.option("--method", "methods", multiple=True, default=tuple(METHODS), help="Which rows of the table.")
@click.option("--seeds", default="0,1,2", help="Seeds, separated by commas.")
@click.option("--split", type=click.Choice(["val", "test"]), default="val")
@click.option("--source", type=click.Choice(["subset", "full"]), default="full")
@click.option("--steps", default=100, show_default=True, help="Steps a stage; a unit gets 0.4 times as many.")
@click.option("--name", default="ablation", help="Results go to results/<name>-<model>.json.")
@click.option("--set", "overrides", multiple=True, help="key=json, overrides a key of every run.")
def main(
    names: tuple[str, ...],
    presets: tuple[str, ...],
    methods: tuple[str, ...],
    seeds: str,
    split: str,
    source: str,
    steps: int,
    name: str,
    overrides: tuple[str, ...],
) -> None:
    """Run the ablation and print one table per model."""
    logging.basicConfig(level=logging.WARNING)
    extra = {key: json.loads(value) for key, _, value in (item.partition("=") for item in overrides)}
    for model_name in names:
        model = load_classifier(model_name)
        images, labels = images_and_labels(split, source, model)
        batches = calibration_batches(model)
        path = RESULTS / f"{name}-{model_name}.json"
        rows = _previous(path)
        float_accuracy = accuracy(model, images, labels)
        click.echo(f"{model_name}: float {float_accuracy:.2f} % on {split}")
        done = {key_of(row) for row in rows}
        for preset in presets:
            for method in methods:
                own_steps = round(UNIT_SHARE * steps) if method.startswith("unit") else steps
                settings = {"steps": own_steps, **METHODS[method], **extra}
                for seed in [int(text) for text in seeds.split(",")]:
                    if (method, preset, seed, split, source) in done or (settings.get("steps") == 0 and seed):
                        continue
                    config = RepAPQConfig.from_preset(preset, **settings, seed=seed)
                    started = time.perf_counter()
                    result = quantize_model(model, batches, config, forward_fn=forward)
                    row = {
                        "method": method,
                        "preset": preset,
                        "seed": seed,
                        "split": split,
                        "source": source,
                        "float": float_accuracy,
                        "accuracy": accuracy(result.model, images, labels),
                        "seconds": round(time.perf_counter() - started, 1),
                        "kept": sum(unit.kept for unit in result.units),
                        "units": len(result.units),
                        "scheme": config.scheme,
                        "config": config.to_dict(),
                    }
                    rows.append(row)
                    click.echo(f"{preset} {method:50s} seed {seed}: {row['accuracy']:.2f}  ({row['seconds']} s)")
                    write_result(f"{name}-{model_name}", {"environment": environment(), "rows": rows})
        _print_table(model_name, [row for row in rows if (row["split"], row["source"]) == (split, source)])


def _previous(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text())["rows"]) if path.exists() else []


def _print_table(model_name: str, rows: list[dict[str, Any]]) -> None:
    presets = list(dict.fromkeys(row["preset"] for row in rows))
    click.echo(f"\n{model_name:52s}" + "".join(f"{preset:>18s}" for preset in presets))
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for preset in presets:
            found = [row["accuracy"] for row in rows if (row["method"], row["preset"]) == (method, preset)]
            spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.2f}{spread}" if found else "")
        click.echo(f"{method:52s}" + "".join(f"{cell:>18s}" for cell in cells))


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    main()
