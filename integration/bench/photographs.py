"""What full-size classifiers on photographs score at 8, 6, 4 and 3 bits.

    python -m integration.bench.photographs repvgg_a0 repvgg_a0.safetensors cifar10 --split test

NETWORK is timm's name, WEIGHTS its checkpoint (safetensors), DATA a folder with ``train/<class>/`` and
``test/<class>/`` of images, the usual layout of CIFAR-10 as image files. Images are scaled to ``--size`` pixels and
normalised as CIFAR-10 is. All methods of a seed quantize with the same calibration images, which that seed draws from
the training images. ``--split val`` scores on training images that no seed calibrates with. A network that was
trained on them knows them by heart, so ``--split hard`` scores on these images changed at random (`HARDER`), on which
float is about as good as on test images. Both are for choosing.
Results go to ``results/photographs.json`` after every run, and a run that is there already is not repeated.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.v2 import RandAugment

from integration.bench.reference import RESULTS, environment, write_result
from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.cli.options import pairs

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
VALIDATION_IMAGES = 2000
HELD_OUT = 1_000_003
"""Seed that parts the validation images from those that any other seed calibrates with."""

HARDER = RandAugment(num_ops=2, magnitude=8)
"""How held-out images are changed. The RepVGG-A0 scores 84.9 on 1,000 of them, 95.1 before and 86.25 on test images."""

CALIBRATION_IMAGES = 512
BATCH = 32

Samples = tuple[Tensor, Tensor]
"""Images, uint8 ``(N, 3, H, W)``, and labels, int64 ``(N,)``."""


def read(files: list[tuple[Path, int]]) -> Samples:
    """Read image files of one size with their labels."""

    def pixels(file: tuple[Path, int]) -> np.ndarray[Any, Any]:
        with Image.open(file[0]) as image:
            return np.asarray(image.convert("RGB"))

    with ThreadPoolExecutor() as pool:
        images = np.stack(list(pool.map(pixels, files)))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor([label for _, label in files])


def files_of(data: Path, split: str) -> list[tuple[Path, int]]:
    """Return the files of ``data/split/<class>/`` with the number of their class."""
    classes = sorted(folder.name for folder in (data / split).iterdir() if folder.is_dir())
    return [(path, label) for label, name in enumerate(classes) for path in sorted((data / split / name).iterdir())]


def shuffled(files: list[tuple[Path, int]], seed: int) -> list[tuple[Path, int]]:
    """Return ``files`` in an order drawn from ``seed``."""
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    return [files[index] for index in order]


def scored_images(data: Path, split: str, limit: int | None) -> Samples:
    """Return what is scored: test images, or the training images that are held out, changed for ``hard``."""
    files = (
        files_of(data, "test") if split == "test" else shuffled(files_of(data, "train"), HELD_OUT)[:VALIDATION_IMAGES]
    )
    images, labels = read(shuffled(files, 0)[:limit])
    if split == "hard":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            images = torch.stack([HARDER(image) for image in images])
    return images, labels


def calibration_images(data: Path, seed: int, count: int = CALIBRATION_IMAGES) -> Tensor:
    """Return ``count`` training images, drawn by ``seed`` from those that are not held out."""
    images, _ = read(shuffled(shuffled(files_of(data, "train"), HELD_OUT)[VALIDATION_IMAGES:], seed)[:count])
    return images


def prepared(images: Tensor, size: int) -> Tensor:
    """Return normalised images, float ``(N, 3, size, size)``."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    normal = (images.float() / 255 - mean) / std
    return nn.functional.interpolate(normal, size=(size, size), mode="bilinear", align_corners=False)


def load_network(name: str, weights: Path, classes: int) -> nn.Module:
    """Return timm's network for so many classes with the weights of a file."""
    state = {key: value.float() if value.is_floating_point() else value for key, value in load_file(weights).items()}
    model: nn.Module = timm.create_model(name, num_classes=classes)
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, samples: Samples, size: int) -> float:
    """Return top-1 accuracy in percent."""
    right = sum(
        int((model(prepared(images, size)).argmax(1) == labels).sum())
        for images, labels in zip(*(part.split(100) for part in samples), strict=True)
    )
    return 100 * right / len(samples[1])


@click.command()
@click.argument("network")
@click.argument("weights", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--preset", "presets", multiple=True, default=("w8a8", "w6a6", "w4a4", "w3a3"), help="Which bits.")
@click.option("--seeds", default="0,1,2", help="Seeds, separated by commas.")
@click.option("--split", type=click.Choice(["val", "hard", "test"]), default="val")
@click.option("--size", default=96, help="Height and width of the network's input, in pixels.")
@click.option("--limit", type=int, help="Score so many images only.")
@click.option("-q", "settings", multiple=True, metavar="KEY=VALUE", help="A key of the configuration.")
@click.option("--name", default="photographs", help="Results go to results/<name>.json.")
def main(
    network: str,
    weights: Path,
    data: Path,
    presets: tuple[str, ...],
    seeds: str,
    split: str,
    size: int,
    limit: int | None,
    settings: tuple[str, ...],
    name: str,
) -> None:
    """Score one network and print one line per run."""
    logging.basicConfig(level=logging.WARNING)
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    keys = ("model", "method", "preset", "seed", "split", "images", "settings")
    done = {tuple(row[key] for key in keys) for row in rows}
    samples = scored_images(data, split, limit)
    model = load_network(network, weights, int(samples[1].max()) + 1)
    float_accuracy = accuracy(model, samples, size)
    click.echo(f"{network}: float {float_accuracy:.2f} on {len(samples[1])} images of {split}")
    for preset in presets:
        config = RepAPQConfig.from_preset(preset, **pairs(settings, "-q"))
        runs = [("plain PTQ", 0, config.plain())]
        runs += [("RepAPQ", int(seed), config.replace(seed=int(seed))) for seed in seeds.split(",")]
        scores = []
        for method, seed, chosen in runs:
            found = (network, method, preset, seed, split, len(samples[1]), " ".join(settings))
            if found not in done:
                batches = [prepared(images, size) for images in calibration_images(data, seed).split(BATCH)]
                started = time.perf_counter()
                result = quantize_model(model, batches, chosen)
                seconds = round(time.perf_counter() - started, 1)
                row = dict(zip(keys, found, strict=True)) | {
                    "float": float_accuracy,
                    "accuracy": accuracy(result.model, samples, size),
                    "seconds": seconds,
                    "kept": sum(unit.kept for unit in result.units),
                    "units": len(result.units),
                    "notes": list(result.notes),
                    "scheme": chosen.scheme,
                    "config": chosen.to_dict(),
                }
                rows.append(row)
                write_result(name, {"environment": environment(), "rows": rows})
            row = next(row for row in rows if tuple(row[key] for key in keys) == found)
            click.echo(f"{preset} {method:10s} seed {seed}: {row['accuracy']:.2f}  ({row['seconds']} s)")
            scores += [row["accuracy"]] if method == "RepAPQ" else []
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        drop = statistics.mean(scores) - float_accuracy
        click.echo(f"{network} {preset}: {statistics.mean(scores):.2f}{spread}, {drop:+.2f} from float")


if __name__ == "__main__":
    main()
