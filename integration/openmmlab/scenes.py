"""Small configs and random networks for the tests: host mechanics do not need trained weights."""

from __future__ import annotations

from pathlib import Path

import torch
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from repapq_plugin.hosts.openmmlab.workbench import open_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "mm_configs" / "fashion"
ASSETS = ROOT / "integration" / "assets"
SCENES = "work_dirs/fashion_scenes"
IMAGES = 16

DETECTOR = CONFIGS / "yolov6-n_fashion.py"
CLASSIFIER = CONFIGS / "repvgg_fashion.py"
DETECTOR_W6A6 = CONFIGS / "repapq_yolov6-n_w6a6_fashion.py"

FEW_SCENES = (
    f"test_dataloader.dataset.count={IMAGES}",
    "test_dataloader.batch_size=8",
    f"test_evaluator.ann_file={SCENES}/test-subset-{IMAGES}-seed0-128px/annotations.json",
    f"calib_dataloader.dataset.count={IMAGES}",
    "calib_dataloader.batch_size=8",
)
FEW_ITEMS = (
    "test_dataloader.dataset.source=subset",
    f"test_dataloader.dataset.count={IMAGES}",
    f"calib_dataloader.dataset.count={IMAGES}",
    "calib_dataloader.batch_size=8",
)


def random_model(config: Path) -> nn.Module:
    """Build the model of a config with random weights, biases and norm statistics, none of them zero."""
    cfg = open_config(config)
    init_default_scope(cfg.get("default_scope", "mmengine"))
    torch.manual_seed(0)
    model: nn.Module = MODELS.build(cfg.model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
            elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1)
    return model.eval()


def random_checkpoint(config: Path, path: Path) -> Path:
    """Save such weights as the toolboxes save checkpoints."""
    torch.save({"state_dict": random_model(config).state_dict(), "meta": {}}, path)
    return path


def options(values: tuple[str, ...]) -> list[str]:
    """Spell config overrides for the command line."""
    return [word for value in values for word in ("--cfg-options", value)]
