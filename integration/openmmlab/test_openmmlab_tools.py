"""The toolboxes' own test tools, unchanged, on configs that opt in."""

from __future__ import annotations

from pathlib import Path

from integration.fashion.scenes import write_coco
from integration.openmmlab.scenes import (
    CLASSIFIER,
    DETECTOR_W6A6,
    FEW_ITEMS,
    FEW_SCENES,
    IMAGES,
    random_checkpoint,
)
from integration.openmmlab.tools import run_tool


def test_mmyolo_with_one_more_base_on_onnxruntime(detector_checkpoint: Path, tmp_path: Path) -> None:
    record = run_tool(
        "mmyolo",
        DETECTOR_W6A6,
        detector_checkpoint,
        tmp_path,
        *FEW_SCENES,
        "repapq.quantizer.steps=1",
        "repapq.backend=onnxruntime",
    )
    assert "coco/bbox_mAP" in record["scores"]["onnxruntime"]
    assert record["scheme"].startswith("W6A6")
    assert record["settings"]["quantizer"]["steps"] == 1
    assert record["size_bytes"]["onnx"] == (tmp_path / "repapq.onnx").stat().st_size


def test_mmpretrain_with_loop_and_hook_by_name(classifier_checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text(
        f"_base_ = {str(CLASSIFIER)!r}\n"
        "custom_imports = dict(\n"
        "    imports=['integration.fashion', 'repapq_plugin.hosts.openmmlab'], allow_failed_imports=False)\n"
        "test_cfg = dict(_delete_=True, type='RepAPQTestLoop', quantizer=dict(preset='w4a4', steps=1))\n"
        "custom_hooks = [dict(type='QPRFusionHook')]\n"
    )
    record = run_tool("mmpretrain", config, classifier_checkpoint, tmp_path / "work", *FEW_ITEMS)
    assert 0 <= record["scores"]["repapq"]["accuracy/top1"] <= 100
    assert record["scheme"].startswith("W4A4")
    assert sum(merge["merged"] for merge in record["calibration"]["merges"]) == 13


def test_mmdet_with_a_head_shared_by_levels(tmp_path: Path) -> None:
    scenes = tmp_path / "scenes"
    annotations = write_coco(scenes, "test", IMAGES, source="subset")
    config = tmp_path / "rtmdet.py"
    config.write_text(
        "_base_ = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'\n"
        "custom_imports = dict(\n"
        "    imports=['integration.fashion', 'repapq_plugin.hosts.openmmlab'], allow_failed_imports=False)\n"
        "from integration.fashion.items import CLASSES\n"
        "model = dict(\n"
        "    backbone=dict(init_cfg=None, widen_factor=0.125, norm_cfg=dict(type='BN')),\n"
        "    neck=dict(in_channels=[32, 64, 128], out_channels=32, norm_cfg=dict(type='BN')),\n"
        "    bbox_head=dict(num_classes=10, in_channels=32, feat_channels=32, norm_cfg=dict(type='BN')))\n"
        "test_pipeline = [\n"
        "    dict(type='LoadImageFromFile'),\n"
        "    dict(type='Resize', scale=(128, 128), keep_ratio=True),\n"
        "    dict(type='LoadAnnotations', with_bbox=True),\n"
        "    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]\n"
        "test_dataloader = dict(\n"
        "    batch_size=8, num_workers=0, persistent_workers=False,\n"
        f"    dataset=dict(_delete_=True, type='CocoDataset', ann_file={str(annotations)!r}, test_mode=True,\n"
        f"        data_prefix=dict(img={str(scenes / 'images') + '/'!r}), metainfo=dict(classes=CLASSES),\n"
        "        pipeline=test_pipeline))\n"
        f"test_evaluator = dict(ann_file={str(annotations)!r})\n"
        "test_cfg = dict(_delete_=True, type='RepAPQTestLoop', backend='openvino',\n"
        "    quantizer=dict(preset='w8a8', steps=1), calibration=dict(dataloader='test_dataloader'))\n"
        "custom_hooks = [*_base_.custom_hooks, dict(type='QPRFusionHook')]\n"
    )
    checkpoint = random_checkpoint(config, tmp_path / "rtmdet.pth")
    record = run_tool("mmdet", config, checkpoint, tmp_path / "work")
    assert "coco/bbox_mAP" in record["scores"]["openvino"]
    assert len(record["calibration"]["plan"]["layers"]) > 30
