"""Networks trained with batch norm, with MimicNorm and with no norm: accuracy, cost of training, quantization.

    python -m integration.bench.mimicnorm accuracy --split test
    python -m integration.bench.mimicnorm accuracy --split test --epochs 9
    python -m integration.bench.mimicnorm quantization --split test
    python -m integration.bench.mimicnorm cost

``accuracy`` trains every network three ways by one recipe: ``--epochs`` of Fashion-MNIST in batches of 128 with random
mirroring, SGD with Nesterov momentum 0.9 and weight decay 5e-4 on weights, a linear warm-up over a tenth of the steps,
then a cosine; the learning rate of each way is `RATES`. ``--split test`` trains on all 60,000 images and scores the
10,000 test images; ``--split val`` trains on 55,000 and scores the other 5,000, for choosing. ``quantization`` takes
the RepVGGs trained so. Results go to ``results/mimicnorm.json`` after every run, trained weights to ``--folder``; a run
that is there already is not repeated.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from integration.bench.mimicnorm_networks import METHODS, NETWORKS, build
from integration.bench.reference import RESULTS, environment, write_result
from integration.fashion import load_items
from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.evaluation.latency import measure_latency
from repapq_plugin.job import merge_for_inference
from repapq_plugin.mimicnorm import LastBatchNorm, WeightMean, convert

RATES = {"batch norm": 0.1, "MimicNorm": 0.4, "no norm": 0.02}
"""Learning rates, chosen on the validation split in short runs of all networks."""

BATCH = 128
WEIGHT_DECAY = 5e-4
FOLDER = Path("work_dirs/bench_mimicnorm")


def load(split: str) -> tuple[Tensor, Tensor]:
    """Return normalised images, float32 ``(N, 1, 28, 28)``, and labels of the full set."""
    items = load_items(split, "full")
    images = torch.from_numpy(items.images.astype(np.float32))[:, None]
    return (images - 72.94) / 90.02, torch.from_numpy(items.labels)


def training_data(split: str) -> tuple[Tensor, Tensor]:
    """Return what a network is trained on that is scored on ``split``."""
    parts = [load(name) for name in (("train",) if split == "val" else ("train", "val"))]
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def make_optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Return SGD with weight decay on weights, not on biases, norms and scalars."""
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": weights, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: float, rate: float, seed: int) -> list[float]:
    """Train in place and return the mean loss of each epoch."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = make_optimizer(model, rate)
    if any(isinstance(module, LastBatchNorm) for module in model.modules()):
        WeightMean(model).attach(optimizer)
    per_epoch = len(images) // BATCH
    steps = round(epochs * per_epoch)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / (steps - warmup))),
    )
    losses: list[float] = []
    order = itertools.chain.from_iterable(
        torch.randperm(len(images), generator=generator)[: per_epoch * BATCH].split(BATCH)
        for _ in range(math.ceil(epochs))
    )
    model.train()
    for chosen in itertools.islice(order, steps):
        batch = images[chosen]
        mirrored = torch.rand(len(batch), generator=generator) < 0.5
        batch[mirrored] = batch[mirrored].flip(-1)
        loss = nn.functional.cross_entropy(model(batch), labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    model.eval()
    return [float(np.mean(losses[start : start + per_epoch])) for start in range(0, steps, per_epoch)]


@torch.no_grad()
def accuracy_of(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return top-1 accuracy in percent."""
    right = sum(
        int((model(batch).argmax(1) == truth).sum())
        for batch, truth in zip(images.split(250), labels.split(250), strict=True)
    )
    return 100 * right / len(labels)


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


def weights_file(folder: Path, network: str, method: str, seed: int, split: str, epochs: int) -> Path:
    """Return where trained weights are kept."""
    return folder / f"{network}_{method.replace(' ', '-')}_{seed}_{split}_{epochs}.pth".lower()


def trained(
    network: str, method: str, seed: int, split: str, epochs: int, data: tuple[Tensor, Tensor], folder: Path
) -> tuple[nn.Module, list[float]]:
    """Return a network, trained now, and its losses; its weights are kept."""
    torch.manual_seed(seed)
    model = build(network, method, data[0][:BATCH])
    losses = train(model, *data, epochs, RATES[method], seed)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), weights_file(folder, network, method, seed, split, epochs))
    return model, losses


@click.group()
@click.option("--threads", default=1, show_default=True)
def main(threads: int) -> None:
    """Compare training with batch norm, MimicNorm and no norm."""
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(threads)


RUNS = [(network, method) for network in NETWORKS for method in METHODS if network != "QARepVGG"]
RUNS.append(("QARepVGG", "batch norm"))


@main.command()
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--split", type=click.Choice(["val", "test"]), default="val")
@click.option("--folder", type=click.Path(path_type=Path), default=FOLDER, show_default=True)
@click.option("--network", "networks", multiple=True, default=tuple(NETWORKS), help="Which networks.")
@click.option("--method", "methods", multiple=True, default=METHODS, help="Which ways.")
@click.option("--epochs", default=3, show_default=True)
def accuracy(
    seeds: str, split: str, folder: Path, networks: tuple[str, ...], methods: tuple[str, ...], epochs: int
) -> None:
    """Train every network three ways and print one line a run."""
    keys = ("network", "method", "seed", "split", "epochs", "learning_rate")
    done = {tuple(row[key] for key in keys) for row in kept_rows("accuracy")}
    data, (images, labels) = training_data(split), load(split)
    for seed in map(int, seeds.split(",")):
        for network, method in RUNS:
            wanted = network in networks and method in methods
            if not wanted or (network, method, seed, split, epochs, RATES[method]) in done:
                continue
            started = time.perf_counter()
            model, losses = trained(network, method, seed, split, epochs, data, folder)
            row = {
                "network": network,
                "method": method,
                "seed": seed,
                "split": split,
                "accuracy": accuracy_of(model, images, labels),
                "losses": [round(loss, 4) for loss in losses],
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "learning_rate": RATES[method],
                "epochs": epochs,
                "seconds": round(time.perf_counter() - started, 1),
            }
            keep("accuracy", row)
            click.echo(f"{network:13s}{method:11s} seed {seed}: {row['accuracy']:.2f} {row['losses']}")


QUANTIZED = (("RepVGG", "batch norm"), ("QARepVGG", "batch norm"), ("RepVGG", "MimicNorm"))
PRESETS = ("w8a8", "w6a6", "w4a4")
CALIBRATION_IMAGES = 512


@main.command()
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--split", type=click.Choice(["val", "test"]), default="val")
@click.option("--steps", default=RepAPQConfig().steps, show_default=True, help="Steps of the calibration.")
@click.option("--folder", type=click.Path(path_type=Path), default=FOLDER, show_default=True)
@click.option("--epochs", default=3, show_default=True, help="Of the training.")
def quantization(seeds: str, split: str, steps: int, folder: Path, epochs: int) -> None:
    """Quantize the RepVGGs of `accuracy` and print one line a run."""
    keys = ("network", "method", "seed", "split", "steps", "epochs")
    done = {tuple(row[key] for key in keys) for row in kept_rows("quantization")}
    data, (images, labels) = training_data(split), load(split)
    batches = list(data[0][:CALIBRATION_IMAGES].split(32))
    for seed in map(int, seeds.split(",")):
        for network, method in QUANTIZED:
            if (network, method, seed, split, steps, epochs) in done:
                continue
            file = weights_file(folder, network, method, seed, split, epochs)
            if file.exists():
                model = build(network, method, data[0][:BATCH])
                model.load_state_dict(torch.load(file))
            else:
                model, _ = trained(network, method, seed, split, epochs, data, folder)
            model.eval()
            row: dict[str, Any] = {
                "network": network,
                "method": method,
                "seed": seed,
                "split": split,
                "steps": steps,
                "epochs": epochs,
                "float": accuracy_of(model, images, labels),
                **outliers(model, batches),
            }
            for preset in PRESETS:
                config = RepAPQConfig.from_preset(preset, seed=seed, steps=steps)
                for name, settings in (("plain PTQ", config.plain()), ("RepAPQ", config)):
                    result = quantize_model(model, batches, settings)
                    row.setdefault(name, {})[preset] = accuracy_of(result.model, images, labels)
            row["config"] = config.to_dict()
            keep("quantization", row)
            click.echo(json.dumps({key: value for key, value in row.items() if key != "config"}))


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


@main.command()
@click.option("--rounds", default=10, show_default=True)
@click.option("--size", default=64, show_default=True, help="Height and width of the images.")
def cost(rounds: int, size: int) -> None:
    """Measure torchvision's ResNet-18 in batches of 128: what it keeps for the backward pass, and a step's time."""
    torch.manual_seed(0)
    images, labels = torch.randn(BATCH, 3, size, size), torch.randint(0, 1000, (BATCH,))
    normed = torchvision.models.resnet18()
    models = {"batch norm": normed.train(), "MimicNorm": convert(normed, images[:8]).model.train()}
    kept = {name: saved_bytes(model, images[:8], labels[:8]) for name, model in models.items()}
    report = measure_latency(
        {name: one_step(model, images, labels) for name, model in models.items()}, rounds=rounds, warmup=1
    )
    row = {
        "network": "torchvision resnet18",
        "batch": BATCH,
        "size": size,
        "activation_bytes_per_image": {name: round(size / 8) for name, size in kept.items()},
        "activations_by_batch_norm": round(kept["MimicNorm"] / kept["batch norm"], 4),
        "median_ms": dict(report.median_ms),
        "step_by_batch_norm": round(report.ratios["MimicNorm", "batch norm"], 4),
        "rounds": rounds,
    }
    keep("cost", row)
    click.echo(json.dumps(row, indent=1))


def one_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return what makes one training step."""
    optimizer = make_optimizer(model, 0.01)
    if any(isinstance(module, LastBatchNorm) for module in model.modules()):
        WeightMean(model).attach(optimizer)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def saved_bytes(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Return how many bytes of activations a forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    return sum(size for pointer, size in kept.items() if pointer not in weights)


if __name__ == "__main__":
    main()
