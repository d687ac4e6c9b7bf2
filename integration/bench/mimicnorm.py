"""Networks trained with batch norm, with MimicNorm and with no norm: accuracy, and what quantization costs.

    python -m integration.bench.mimicnorm accuracy --split test
    python -m integration.bench.mimicnorm accuracy --split test --epochs 9
    python -m integration.bench.mimicnorm quantization --split test
    python -m integration.bench.mimicnorm accuracy --data cifar10 --split test --epochs 15 --seeds 0,1
    python -m integration.bench.mimicnorm quantization --data cifar10 --split test --epochs 15 --seeds 0,1

``accuracy`` trains every network three ways by one recipe: ``--epochs`` of Fashion-MNIST in batches of 128 with random
mirroring, SGD with Nesterov momentum 0.9 and weight decay 5e-4 on weights, a linear warm-up over a tenth of the steps,
then a cosine; the learning rate of each way is `RATES`. ``--recipe`` trains MimicNorm by another one. ``--split test``
trains on all 60,000 images and scores the 10,000 test images; ``--split val`` trains on 55,000 and scores the other
5,000, for choosing. ``--data`` takes photographs in place of Fashion-MNIST, a folder with ``train/<class>/`` and
``test/<class>/`` of images of 32 x 32 pixels, the usual layout of CIFAR-10 as image files: wider networks, and images
moved by up to four pixels, too. ``quantization`` takes the networks trained so. Results go to
``results/mimicnorm.json`` after every run, trained weights to ``--folder``; a run that is there already is not
repeated.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from integration.bench.mimicnorm_networks import METHODS, NETWORKS, PHOTOGRAPH_NETWORKS, build
from integration.bench.mimicnorm_training import BATCH, RATES, Task, accuracy_of, fashion, photographs, train
from integration.bench.reference import RESULTS, environment, write_result
from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.job import merge_for_inference
from repapq_plugin.mimicnorm import RECIPES, Recipe

FOLDER = Path("work_dirs/bench_mimicnorm")


def kept_rows(part: str) -> list[dict[str, Any]]:
    """Return the rows of one part of ``results/mimicnorm.json``."""
    path = RESULTS / "mimicnorm.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()).get(part, []) if path.exists() else []
    return rows


def keep(part: str, row: dict[str, Any]) -> None:
    """Add one row to a part of ``results/mimicnorm.json``."""
    path = RESULTS / "mimicnorm.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    content["environment"] = environment()
    content.setdefault(part, []).append(row)
    write_result("mimicnorm", content)


CHOICES: Mapping[str, Recipe] = {
    **RECIPES,
    "scalars": Recipe(concatenated=True),
    "dense": Recipe(min_fan_in=1, linear_mean=False),
    "dense-linear": Recipe(min_fan_in=1),
    "dense-scalars": Recipe(min_fan_in=1, linear_mean=False, concatenated=True),
    "fan-in-9": Recipe(min_fan_in=9),
}
"""Recipes that `accuracy` can compare."""


@dataclass(frozen=True)
class Trainings:
    """What trainings have in common.

    Args:
        split: ``val`` or ``test``.
        epochs: How many.
        folder: Where weights are kept.
        data: A folder of photographs; Fashion-MNIST without it.
        recipe: A key of `CHOICES`.
    """

    split: str
    epochs: int
    folder: Path
    data: Path | None = None
    recipe: str = "default"

    @property
    def networks(self) -> Mapping[str, Callable[[], nn.Module]]:
        """What is trained, by name."""
        return NETWORKS if self.data is None else PHOTOGRAPH_NETWORKS

    @property
    def part(self) -> str:
        """The prefix of the result's parts."""
        return "" if self.data is None else "photographs-"

    @cached_property
    def task(self) -> Task:
        """The images."""
        return fashion(self.split) if self.data is None else photographs(self.data, self.split)

    def file(self, network: str, method: str, seed: int) -> Path:
        """Return where trained weights are kept."""
        way = method.replace(" ", "-") + (f"-{self.recipe}" if method == "MimicNorm" else "")
        return self.folder / f"{self.part}{network}_{way}_{seed}_{self.split}_{self.epochs}.pth".lower()

    def new(self, network: str, method: str) -> nn.Module:
        """Return a network to train."""
        return build(network, method, self.task.images[:BATCH], CHOICES[self.recipe], self.networks)

    def trained(self, network: str, method: str, seed: int) -> tuple[nn.Module, list[float]]:
        """Return a network, trained now, and its losses; its weights are kept."""
        torch.manual_seed(seed)
        model = self.new(network, method)
        task, moved = self.task, self.data is not None
        rate = RATES[method]
        losses = train(model, task.images, task.labels, self.epochs, rate, seed, CHOICES[self.recipe], moved)
        file = self.file(network, method, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
        return model, losses

    def named(self, network: str, method: str, seed: int) -> dict[str, Any]:
        """Return what tells a row from others."""
        row: dict[str, Any] = {"network": network, "method": method, "seed": seed, "split": self.split}
        row["epochs"] = self.epochs
        return {**row, "recipe": asdict(CHOICES[self.recipe])} if method == "MimicNorm" else row

    def there(self, part: str, named: dict[str, Any]) -> bool:
        """Tell whether a row of these values is kept already."""
        return any(named.items() <= row.items() for row in kept_rows(self.part + part))


@click.group()
@click.option("--threads", default=1, show_default=True)
def main(threads: int) -> None:
    """Compare training with batch norm, MimicNorm and no norm."""
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(threads)


RUNS = [(network, method) for network in NETWORKS for method in METHODS if network != "QARepVGG"]
RUNS.append(("QARepVGG", "batch norm"))
PHOTOGRAPH_RUNS = [(network, method) for network in PHOTOGRAPH_NETWORKS for method in METHODS[:2]]


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say what is trained."""
    for option in (
        click.option("--seeds", default="0,1,2", show_default=True),
        click.option("--split", type=click.Choice(["val", "test"]), default="val"),
        click.option("--folder", type=click.Path(path_type=Path), default=FOLDER, show_default=True),
        click.option("--epochs", default=3, show_default=True, help="Of a training."),
        click.option("--recipe", type=click.Choice(list(CHOICES)), default="default", show_default=True),
        click.option("--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Photographs."),
        click.option("--network", "networks", multiple=True, help="Which networks; default: all."),
        click.option("--method", "methods", multiple=True, default=METHODS, help="Which ways."),
    ):
        command = option(command)
    return command


@main.command()
@common_options
def accuracy(
    seeds: str,
    split: str,
    folder: Path,
    epochs: int,
    recipe: str,
    data: Path | None,
    networks: tuple[str, ...],
    methods: tuple[str, ...],
) -> None:
    """Train every network three ways and print one line a run."""
    all_of = Trainings(split, epochs, folder, data, recipe)
    runs = RUNS if data is None else PHOTOGRAPH_RUNS
    for seed in map(int, seeds.split(",")):
        for network, method in runs:
            named = all_of.named(network, method, seed)
            wanted = network in (networks or all_of.networks) and method in methods
            if not wanted or all_of.there("accuracy", named):
                continue
            started = time.perf_counter()
            model, losses = all_of.trained(network, method, seed)
            row = named | {
                "accuracy": accuracy_of(model, *all_of.task.scored),
                "losses": [round(loss, 4) for loss in losses],
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "learning_rate": RATES[method],
                "seconds": round(time.perf_counter() - started, 1),
            }
            keep(f"{all_of.part}accuracy", row)
            click.echo(f"{network:13s}{method:11s} seed {seed}: {row['accuracy']:.2f} {row['losses']}")


QUANTIZED = (("RepVGG", "batch norm"), ("QARepVGG", "batch norm"), ("RepVGG", "MimicNorm"))
QUANTIZED_PHOTOGRAPHS = [(network, method) for network in ("RepVGG", "MobileOne") for method in METHODS[:2]]
PRESETS = ("w8a8", "w6a6", "w4a4")
CALIBRATION_IMAGES = 512


@main.command()
@common_options
@click.option("--steps", default=RepAPQConfig().steps, show_default=True, help="Steps of the calibration.")
def quantization(
    seeds: str,
    split: str,
    folder: Path,
    epochs: int,
    recipe: str,
    data: Path | None,
    networks: tuple[str, ...],
    methods: tuple[str, ...],
    steps: int,
) -> None:
    """Quantize the RepVGGs, and for photographs the MobileOnes, of `accuracy` and print one line a run."""
    all_of = Trainings(split, epochs, folder, data, recipe)
    for seed in map(int, seeds.split(",")):
        for network, method in QUANTIZED if data is None else QUANTIZED_PHOTOGRAPHS:
            named = all_of.named(network, method, seed) | {"steps": steps}
            wanted = network in (networks or all_of.networks) and method in methods
            if not wanted or all_of.there("quantization", named):
                continue
            file = all_of.file(network, method, seed)
            if file.exists():
                model = all_of.new(network, method)
                model.load_state_dict(torch.load(file))
            else:
                model, _ = all_of.trained(network, method, seed)
            row = named | quantized(model.eval(), all_of.task, seed, steps)
            keep(f"{all_of.part}quantization", row)
            click.echo(json.dumps({key: value for key, value in row.items() if key != "config"}))


def quantized(model: nn.Module, task: Task, seed: int, steps: int) -> dict[str, Any]:
    """Return what a network scores in float and quantized, and how far its weights and activations reach."""
    batches = list(task.images[:CALIBRATION_IMAGES].split(32))
    row: dict[str, Any] = {"float": accuracy_of(model, *task.scored), **outliers(model, batches)}
    for preset in PRESETS:
        config = RepAPQConfig.from_preset(preset, seed=seed, steps=steps)
        for name, settings in (("plain PTQ", config.plain()), ("RepAPQ", config)):
            result = quantize_model(model, batches, settings)
            row.setdefault(name, {})[preset] = accuracy_of(result.model, *task.scored)
    return row | {"config": config.to_dict()}


@torch.no_grad()
def outliers(model: nn.Module, batches: list[Tensor]) -> dict[str, dict[str, float]]:
    """Return how far activations and merged weights reach: means over the convolutions.

    ``kurtosis`` is the fourth standardised moment (3 for a normal variable); ``peak`` the largest absolute value by
    the standard deviation. Activations are what convolutions read behind an activation; weights are standardised
    within each output channel, as they are quantized.
    """
    merged, *_ = merge_for_inference(model, lambda network: network(batches[0]))
    layers = [layer for layer in merged.modules() if isinstance(layer, nn.Conv2d)]
    read: dict[nn.Module, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda layer, args: read.__setitem__(layer, args[0].flatten()[None]))
        for layer in layers[1:]
    ]
    merged(torch.cat(batches))
    for handle in handles:
        handle.remove()
    groups = {"activations": list(read.values()), "weights": [layer.weight.flatten(1) for layer in layers]}
    return {name: {"kurtosis": mean(kurtosis, rows), "peak": mean(peak, rows)} for name, rows in groups.items()}


def mean(measure: Callable[[Tensor], Tensor], groups: list[Tensor]) -> float:
    """Return the mean over groups of the mean over their rows."""
    return round(float(np.mean([float(measure(rows.double()).mean()) for rows in groups])), 3)


def kurtosis(rows: Tensor) -> Tensor:
    """Return the fourth standardised moment of each row, ``(rows, values)`` to ``(rows,)``."""
    centred = rows - rows.mean(1, keepdim=True)
    return centred.pow(4).mean(1) / centred.pow(2).mean(1).pow(2).clamp_min(1e-300)


def peak(rows: Tensor) -> Tensor:
    """Return the largest absolute value of each row by its standard deviation."""
    return rows.abs().amax(1) / rows.std(1).clamp_min(1e-150)


if __name__ == "__main__":
    main()
