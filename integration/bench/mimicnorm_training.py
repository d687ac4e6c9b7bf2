"""The recipe that every network of `mimicnorm` is trained by, and the images it sees."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from integration.bench.photographs import HELD_OUT, MEAN, STD, files_of, read, shuffled
from integration.fashion import load_items
from repapq_plugin.mimicnorm import LastBatchNorm, Recipe, WeightMean, find_recipe, make_sgd

RATES = {"batch norm": 0.1, "MimicNorm": 0.4, "no norm": 0.02}
"""Learning rates, chosen on the validation split in short runs of all networks."""

BATCH = 128
WEIGHT_DECAY = 5e-4
HELD_OUT_PHOTOGRAPHS = 5000
PADDING = 4
"""Photographs are moved by up to so many pixels, as the authors do; the fashion items fill their images."""


@dataclass(frozen=True)
class Task:
    """What is learned and scored.

    Args:
        images: Training images, normalised, float32 ``(N, C, H, W)``.
        labels: Their classes, int64 ``(N,)``.
        scored: Images that are scored, and their classes.
        classes: How many there are.
    """

    images: Tensor
    labels: Tensor
    scored: tuple[Tensor, Tensor]
    classes: int


def fashion(split: str) -> Task:
    """Return Fashion-MNIST: ``val`` learns 55,000 images and scores 5,000, ``test`` learns 60,000, scores 10,000."""
    parts = [_items(name) for name in (("train",) if split == "val" else ("train", "val"))]
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Task(images, labels, _items(split), 10)


def _items(split: str) -> tuple[Tensor, Tensor]:
    items = load_items(split, "full")
    images = torch.from_numpy(items.images.astype(np.float32))[:, None]
    return (images - 72.94) / 90.02, torch.from_numpy(items.labels)


def photographs(folder: Path, split: str, held_out: int = HELD_OUT_PHOTOGRAPHS) -> Task:
    """Return image files of one size in ``train/<class>/`` and ``test/<class>/``.

    Args:
        folder: Such as CIFAR-10 as image files.
        split: ``val`` holds training images out and scores them, ``test`` learns them all.
        held_out: How many.
    """
    training = shuffled(files_of(folder, "train"), HELD_OUT)
    own = (training[held_out:], training[:held_out])
    learned, scored = own if split == "val" else (training, files_of(folder, "test"))
    (images, labels), (seen, truth) = read(learned), read(scored)
    return Task(_normal(images), labels, (_normal(seen), truth), int(labels.max()) + 1)


def _normal(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def make_optimizer(model: nn.Module, rate: float, recipe: Recipe | str = "default") -> torch.optim.Optimizer:
    """Return the optimizer of a recipe; whatever is trained otherwise takes the default's."""
    return make_sgd(model, rate, weight_decay=WEIGHT_DECAY, recipe=recipe)


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epochs: float,
    rate: float,
    seed: int,
    recipe: Recipe | str = "default",
    moved: bool = False,
) -> list[float]:
    """Train in place and return the mean loss of each epoch.

    Args:
        model: A network of `build`.
        images: Training images, ``(N, C, H, W)``.
        labels: Their classes.
        epochs: May be a fraction.
        rate: The highest learning rate.
        seed: Of the order of images and of how they are changed.
        recipe: That the network was converted by.
        moved: Images are moved by up to `PADDING` pixels, too, not only mirrored.
    """
    chosen = find_recipe(recipe)
    generator = torch.Generator().manual_seed(seed)
    mimic = any(isinstance(module, LastBatchNorm) for module in model.modules())
    optimizer = make_optimizer(model, rate, chosen if mimic else "default")
    if mimic:
        WeightMean(model, chosen).attach(optimizer)
    per_epoch = len(images) // BATCH
    steps = round(epochs * per_epoch)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / (steps - warmup))),
    )
    losses: list[float] = []
    model.train()
    for picked in itertools.islice(_order(len(images), math.ceil(epochs), generator), steps):
        batch = images[picked]
        mirrored = torch.rand(len(batch), generator=generator) < 0.5
        batch[mirrored] = batch[mirrored].flip(-1)
        if moved:
            batch = _moved(batch, generator)
        loss = nn.functional.cross_entropy(model(batch), labels[picked])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    model.eval()
    return [float(np.mean(losses[start : start + per_epoch])) for start in range(0, steps, per_epoch)]


def _order(count: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the indices of each batch."""
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator)[: count // BATCH * BATCH].split(BATCH)


def _moved(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Return a batch moved by whole pixels, all images alike; what comes in at the edge is the mean."""
    height, width = batch.shape[-2:]
    top, left = torch.randint(0, 2 * PADDING + 1, (2,), generator=generator).tolist()
    padded = nn.functional.pad(batch, (PADDING,) * 4)
    return padded[..., top : top + height, left : left + width].contiguous()


@torch.no_grad()
def accuracy_of(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return top-1 accuracy in percent."""
    right = sum(
        int((model(batch).argmax(1) == truth).sum())
        for batch, truth in zip(images.split(250), labels.split(250), strict=True)
    )
    return 100 * right / len(labels)
