"""Every ready config: its full-size model builds, merges, quantizes and runs (random weights, one small image)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

from integration.openmmlab.scenes import ROOT
from repapq_plugin.core.tensors import tensors_of
from repapq_plugin.hosts.openmmlab.network import run_batch
from repapq_plugin.hosts.openmmlab.settings import settings_of
from repapq_plugin.hosts.openmmlab.work import calibrate
from repapq_plugin.hosts.openmmlab.workbench import open_config
from repapq_plugin.quantizers.layers import QuantizedLayer
from repapq_plugin.reparam.branches import is_registered
from repapq_plugin.reparam.merge import MergedBlock

FOLDERS = ("mmdet", "mmpretrain", "mmseg", "mmyolo")
READY = sorted(path for folder in FOLDERS for path in (ROOT / "mm_configs" / folder).glob("repapq_*.py"))
EVERY_MODEL = [path for path in READY if "_w8a8_" in path.name]

# Their convolutions have one branch each: what RepAPQ calibrates there are the layers as they are.
WITHOUT_BRANCHES = ("rtmdet", "yolov7-tiny")


def one_image(scope: str, size: int) -> dict[str, Any]:
    """One random image, collated as the toolbox's test dataloader does."""
    image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
    if scope == "mmpretrain":
        return {"inputs": image[None], "data_samples": None}
    if scope == "mmseg":
        from mmseg.structures import SegDataSample as DataSample
    else:
        from mmdet.structures import DetDataSample as DataSample
    sample = DataSample(metainfo={"img_shape": (size, size), "ori_shape": (size, size), "scale_factor": (1.0, 1.0)})
    return {"inputs": [image], "data_samples": [sample]}


@pytest.mark.parametrize("path", EVERY_MODEL, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_model_builds_merges_quantizes_and_runs(path: Path) -> None:
    cfg = open_config(path)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model).eval()
    blocks = sum(is_registered(module) for module in model.modules())
    assert (blocks > 0) != any(family in path.name for family in WITHOUT_BRANCHES)
    batch = one_image(cfg.default_scope, 64 if cfg.default_scope == "mmpretrain" else 128)
    settings = settings_of(cfg, quantizer={"steps": 0, "activation_observer": "min_max", "weight_observer": "min_max"})
    result = calibrate(model, [batch], settings.quantizer)
    del model
    assert [merge.reason for merge in result.merges if not merge.merged] == []
    # Each level of RTMDet's heads has norms of its own behind convolutions that all levels share.
    unfolded = [note for note in result.notes if note.startswith("Norms that were not folded")]
    assert len(unfolded) == ("rtmdet" in path.name)
    assert all("_convs.0.0.bn" in note and note.count(": its input is not the output of one") == 1 for note in unfolded)
    # Random weights can amplify rounding so much that equalizing is refused; nothing else may be worth a note.
    others = [note for note in result.notes if not note.startswith("Equalizing channels")]
    assert others == unfolded
    assert sum(isinstance(module, MergedBlock) for module in result.model.modules()) >= blocks
    assert not any(is_registered(module) for module in result.model.modules())
    # A head that only helps a training is not called here, and is named.
    assert {name for name in result.plan.float_layers if not name.startswith("auxiliary_head.")} == set()
    quantized = sum(isinstance(module, QuantizedLayer) for module in result.model.modules())
    assert quantized == len(result.plan.layers) >= 20
    with torch.no_grad():
        outputs = tensors_of(run_batch(result.model, batch))
    assert outputs
    assert all(bool(output.isfinite().all()) for output in outputs)


@pytest.mark.parametrize("path", READY, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_ready_config_adds_its_bits_and_nothing_else(path: Path) -> None:
    cfg = open_config(path)
    scheme = next(word for word in path.stem.split("_") if word in ("w8a8", "mixed"))
    bits = settings_of(cfg).quantizer
    assert (bits.weight_bits, bits.activation_bits) == {"w8a8": (8, 8), "mixed": (4, 8)}[scheme]
    assert bits.first_last_bits == 8
    # A checkpoint is the user's choice, and never the start of somebody's training.
    assert cfg.get("load_from") is None
    for key in ("model", "train_dataloader", "test_dataloader", "test_evaluator"):
        assert isinstance(cfg[key], Mapping)
    if scheme == "mixed":
        sibling = open_config(path.with_name(path.name.replace("_mixed_", "_w8a8_")))
        assert sibling.model == cfg.model
