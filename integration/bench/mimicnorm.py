"""Networks trained with batch norm, with MimicNorm and with no norm: accuracy, cost of training, quantization.

    python -m integration.bench.mimicnorm accuracy --split test
    python -m integration.bench.mimicnorm quantization --split test
    python -m integration.bench.mimicnorm cost

``accuracy`` trains every network three ways by one recipe: three epochs of Fashion-MNIST in batches of 128 with random
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
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from integration.bench.mimicnorm_networks import METHODS, NETWORKS, build
from integration.bench.reference import RESULTS, environment, write_result
from integration.fashion import load_items
from repapq_plugin.mimicnorm import LastBatchNorm, WeightMean

RATES = {"batch norm": 0.1, "MimicNorm": 0.4, "no norm": 0.02}
"""Learning rates, chosen on the validation split in short runs of all networks."""

EPOCHS = 3
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


def weights_file(folder: Path, network: str, method: str, seed: int, split: str) -> Path:
    """Return where trained weights are kept."""
    return folder / f"{network}_{method.replace(' ', '-')}_{seed}_{split}.pth".lower()


def trained(
    network: str, method: str, seed: int, split: str, data: tuple[Tensor, Tensor], folder: Path
) -> tuple[nn.Module, list[float]]:
    """Return a network, trained now, and its losses; its weights are kept."""
    torch.manual_seed(seed)
    model = build(network, method, data[0][:BATCH])
    losses = train(model, *data, EPOCHS, RATES[method], seed)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), weights_file(folder, network, method, seed, split))
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
def accuracy(seeds: str, split: str, folder: Path) -> None:
    """Train every network three ways and print one line a run."""
    done = {(row["network"], row["method"], row["seed"], row["split"]) for row in kept_rows("accuracy")}
    data, (images, labels) = training_data(split), load(split)
    for seed in map(int, seeds.split(",")):
        for network, method in RUNS:
            if (network, method, seed, split) in done:
                continue
            started = time.perf_counter()
            model, losses = trained(network, method, seed, split, data, folder)
            row = {
                "network": network,
                "method": method,
                "seed": seed,
                "split": split,
                "accuracy": accuracy_of(model, images, labels),
                "losses": [round(loss, 4) for loss in losses],
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "learning_rate": RATES[method],
                "epochs": EPOCHS,
                "seconds": round(time.perf_counter() - started, 1),
            }
            keep("accuracy", row)
            click.echo(f"{network:13s}{method:11s} seed {seed}: {row['accuracy']:.2f} {row['losses']}")


if __name__ == "__main__":
    main()
