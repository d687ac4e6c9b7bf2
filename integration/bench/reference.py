"""The reference classifiers and their data, as the benchmarks and tests use them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
CALIBRATION_IMAGES = 512
BATCH = 32


def load_classifier(name: str) -> nn.Module:
    """Return the trained float classifier ``"repvgg"`` or ``"mobileone"``, branches and all, in eval mode."""
    from mmengine.config import Config
    from mmpretrain.apis import get_model

    config = Config.fromfile(ROOT / "mm_configs" / "fashion" / f"{name}_fashion.py")
    model: nn.Module = get_model(config, str(ROOT / "integration" / "assets" / f"{name}_fashion.pth"), device="cpu")
    return model.eval()


def images_and_labels(split: str, source: str, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return normalised images, float ``(N, C, H, W)``, and labels, ``(N,)``, through the config's test pipeline."""
    from mmpretrain.registry import DATASETS

    dataset = DATASETS.build({**model._config.test_dataloader.dataset, "split": split, "source": source})
    samples = [dataset[index] for index in range(len(dataset))]
    raw = torch.stack([sample["inputs"] for sample in samples])
    labels = torch.cat([sample["data_samples"].gt_label for sample in samples])
    return model.data_preprocessor({"inputs": raw})["inputs"], labels


def calibration_batches(model: nn.Module, count: int = CALIBRATION_IMAGES) -> list[Tensor]:
    """Return the first ``count`` training images of the shipped subset, in batches of 32."""
    images, _ = images_and_labels("train", "subset", model)
    return list(images[:count].split(BATCH))


def forward(model: nn.Module, batch: Tensor) -> Any:
    """Run a classifier up to its logits."""
    return model(batch, mode="tensor")


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return top-1 accuracy in percent."""
    right = 0
    for batch, truth in zip(images.split(250), labels.split(250), strict=True):
        right += int((forward(model, batch).argmax(1) == truth).sum())
    return 100 * right / len(labels)


def environment(*more: str) -> dict[str, Any]:
    """Return what a figure depends on besides its command: processor features, threads, versions.

    Args:
        *more: Packages whose versions count besides, where they are installed.
    """
    flags = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        flags = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "")
    packages = ("torch", "onedl-mmpretrain", "visaion4mmyolo", "nncf", "openvino", "onnxruntime")
    return {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "features": [
            feature for feature in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if feature in flags
        ],
        "threads": torch.get_num_threads(),
        "versions": {name: found for name in (*packages, *more) if (found := _version(name))},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def write_result(name: str, content: dict[str, Any]) -> Path:
    """Write ``content`` to ``results/<name>.json``, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=RESULTS, suffix=".json", delete=False) as file:
        json.dump(content, file, indent=1)
        file.write("\n")
    target = RESULTS / f"{name}.json"
    Path(file.name).replace(target)
    target.chmod(0o644)
    return target
