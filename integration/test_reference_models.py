"""The shipped networks for masks and segments: small, safe to load, branched, as good as their descriptions say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmpretrain.models.backbones.repvgg import RepVGGBlock

from integration.fashion.scenes import ANNOTATIONS_FILE, scene_folder
from repapq_plugin.hosts.openmmlab.workbench import Workbench, open_config

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "integration" / "assets"
MEBIBYTE = 1 << 20

MODELS = {
    "rtmdet-ins": (11, {"coco/bbox_mAP": 0.4, "coco/segm_mAP": 0.4}),
    "repvgg-fcn": (13, {"mIoU": 50.0, "aAcc": 90.0}),
}
"""How many blocks with branches, and the least that a useful network scores."""


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def described(name: str) -> dict[str, Any]:
    description: dict[str, Any] = json.loads((ASSETS / f"{name}_fashion.json").read_text())
    return description


def test_description_says_how_to_make_it(name: str) -> None:
    description = described(name)
    assert (ASSETS / f"{name}_fashion.pth").stat().st_size <= 4 * MEBIBYTE
    assert (ROOT / description["config"]).is_file()
    for command in ("train_command", "test_command"):
        assert description["config"] in description[command]
    assert description["seed"] == 0
    assert any("loss" in entry for entry in description["log"])
    for metric, least in MODELS[name][1].items():
        assert description["test"][metric] >= least


def test_shipped_network_scores_what_is_described(name: str, tmp_path: Path) -> None:
    checkpoint = ASSETS / f"{name}_fashion.pth"
    weights = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    assert all(torch.isfinite(value).all() for value in weights.values())
    config = open_config(ROOT / "mm_configs" / "fashion" / f"repapq_{name}_w8a8_fashion.py")
    # Made anew in a folder of its own, so that no scene of earlier runs takes part.
    config.test_dataloader.dataset.data_root = str(tmp_path)
    if "ann_file" in config.test_evaluator:
        config.test_evaluator.ann_file = str(tmp_path / scene_folder("test", "subset", 300) / ANNOTATIONS_FILE)
    bench = Workbench(config, str(checkpoint), tmp_path / "work")
    blocks = [module for module in bench.model.modules() if isinstance(module, RepVGGBlock)]
    assert len(blocks) == MODELS[name][0]
    scores = bench.score(bench.model)
    for metric, least in MODELS[name][1].items():
        # Another machine sums in another order, which may move one box of the hundreds across a threshold.
        assert scores[metric] == pytest.approx(described(name)["test"][metric], abs=0.005 * least)
