"""Whole detectors in a file: what it finds is what the toolbox finds, and what cannot be written is said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openvino
import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import get_installed_path
from torch import Tensor, nn

from integration.openmmlab.scenes import DETECTOR_W6A6, FEW_SCENES, ROOT, options
from repapq_plugin.cli import main
from repapq_plugin.core.origin import Decoding
from repapq_plugin.core.tensors import tensors_of
from repapq_plugin.errors import ExportError, HostError
from repapq_plugin.export.origins import read_origin
from repapq_plugin.hosts.openmmlab.decoding import DecodedHead
from repapq_plugin.hosts.openmmlab.detections import on_original
from repapq_plugin.hosts.openmmlab.detectors import (
    SAME,
    _compare,
    _drawn,
    decoding_graph,
    one_stage_head,
    toolbox_detections,
)
from repapq_plugin.hosts.openmmlab.workbench import open_config

SIZE = 256
METRICS = ("coco/bbox_mAP", "coco/bbox_mAP_50", "coco/bbox_mAP_75")


def built(toolbox: str, config: str) -> nn.Module:
    """A toolbox's own model with random weights, nothing fetched."""
    cfg = open_config(Path(get_installed_path(toolbox)) / ".mim" / "configs" / f"{config}.py")
    init_default_scope(cfg.get("default_scope", "mmengine"))
    cfg.model.backbone.pop("init_cfg", None)
    torch.manual_seed(0)
    model: nn.Module = MODELS.build(cfg.model)
    return model.eval()


def decoded(model: nn.Module, image_shape: tuple[int, int] = (SIZE - 6, SIZE - 6)) -> tuple[DecodedHead, list[Tensor]]:
    with torch.no_grad():
        template = model(torch.randn(1, 3, SIZE, SIZE), mode="tensor")
    return DecodedHead(one_stage_head(model), template, (SIZE, SIZE), image_shape).eval(), tensors_of(template)


@pytest.mark.parametrize(
    ("toolbox", "config", "wanted"),
    [
        ("mmyolo", "yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco", Decoding(None, True)),
        ("mmyolo", "yolov6/yolov6_n_syncbn_fast_8xb32-400e_coco", Decoding(None, True)),
        ("mmyolo", "yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco", Decoding(None, True)),
        ("mmyolo", "rtmdet/rtmdet_tiny_syncbn_fast_8xb32-300e_coco", Decoding(None, True)),
        ("mmyolo", "ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco", Decoding(None, True)),
        ("mmyolo", "yolox/yolox_tiny_fast_8xb8-300e_coco", Decoding(None, True)),
        ("mmdet", "retinanet/retinanet_r18_fpn_1x_coco", Decoding((SIZE - 6, SIZE - 6), False)),
        ("mmdet", "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco", Decoding((SIZE - 6, SIZE - 6), False)),
        ("mmdet", "atss/atss_r50_fpn_1x_coco", Decoding((SIZE - 6, SIZE - 6), False)),
        ("mmdet", "rtmdet/rtmdet_tiny_8xb32-300e_coco", Decoding((SIZE - 6, SIZE - 6), False)),
        ("mmdet", "yolox/yolox_tiny_8xb8-300e_coco", Decoding(None, False)),
    ],
    ids=lambda value: value.split("/")[0] if isinstance(value, str) else "",
)
def test_a_heads_decoding_finds_what_the_toolbox_finds(
    toolbox: str, config: str, wanted: Decoding, tmp_path: Path
) -> None:
    head, raw = decoded(built(toolbox, config))
    graph = decoding_graph(head, raw, 17)  # compares in onnxruntime
    assert head.decoding == wanted
    path = tmp_path / "decoding.onnx"
    path.write_bytes(graph.SerializeToString())
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    values = _drawn(head, raw)
    results = compiled([value.numpy() for value in values])
    found = toolbox_detections(head, values)
    assert len(found[1]) > 50
    _compare([torch.as_tensor(results[index]) for index in range(3)], found)


@pytest.mark.parametrize(
    ("toolbox", "config", "message"),
    [
        ("mmdet", "faster_rcnn/faster-rcnn_r50_fpn_1x_coco", "FasterRCNN has two stages"),
        ("mmdet", "detr/detr_r50_8xb2-150e_coco", "DETR .*reads its features with a transformer"),
        ("mmdet", "solo/solo_r50_fpn_1x_coco", "SOLO gives masks"),
        ("mmdet", "rtmdet/rtmdet-ins_tiny_8xb32-300e_coco", "RTMDetInsSepBNHead gives more than upright boxes"),
        ("mmdet", "centernet/centernet_r18_8xb16-crop512-140e_coco", "test_cfg.nms=None has no form in a file"),
        ("mmdet", "yolo/yolov3_mobilenetv2_8xb24-320-300e_coco", "test_cfg.conf_thr=0.005 of YOLOV3Head"),
    ],
    ids=lambda value: value.split("/")[0] if "/" in value else "",
)
def test_what_cannot_be_written_is_said(toolbox: str, config: str, message: str) -> None:
    model = built(toolbox, config)
    with pytest.raises(HostError, match=message):
        DecodedHead(one_stage_head(model), (), (SIZE, SIZE), (SIZE, SIZE))


def test_a_graph_that_finds_something_else_is_an_error() -> None:
    head, raw = decoded(built("mmyolo", "yolov6/yolov6_n_syncbn_fast_8xb32-400e_coco"))
    found = toolbox_detections(head, _drawn(head, raw))
    _compare(found, found)
    some = int(len(found[1]) * (1 - SAME)) + 2
    moved = found[0].clone()
    moved[:some] += SIZE
    with pytest.raises(ExportError, match=r"The graph finds \d+ boxes where the toolbox finds \d+"):
        _compare([moved, *found[1:]], found)
    with pytest.raises(ExportError, match="The graph finds"):
        _compare([value[some:] for value in found], found)
    head.threshold = 2.0  # nothing is left
    with pytest.raises(ExportError, match="The decoding of YOLOv6Head cannot be written.*Leave --with-decoding out"):
        decoding_graph(head, raw, 17)


def test_boxes_go_back_to_the_original_image() -> None:
    boxes = torch.tensor([[10.0, 20.0, 30.0, 60.0], [0.0, 0.0, 90.0, 90.0]])
    metas = {"scale_factor": (2.0, 4.0), "pad_param": [8.0, 8.0, 6.0, 6.0], "ori_shape": (12, 20)}
    assert on_original(boxes, metas, False).tolist() == [[2.0, 3.0, 12.0, 13.0], [-3.0, -2.0, 42.0, 20.5]]
    assert on_original(boxes, metas, True).tolist() == [[2.0, 3.0, 12.0, 12.0], [0.0, 0.0, 20.0, 12.0]]


@pytest.fixture(scope="module")
def folder(home: Path) -> Iterator[Path]:
    made = home / "whole"
    shipped = ROOT / "integration" / "assets" / "yolov6-n_fashion.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        words = ["quantize", str(DETECTOR_W6A6), str(shipped), "-w", str(made), "-q", "steps=0", "--preset", "w8a8"]
        assert main([*words, "--export", "onnx,openvino", "--no-compare", *options(FEW_SCENES)]) == 0
    yield made


def _scores(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, float]:
    capsys.readouterr()
    assert main(["eval", *words]) == 0
    lines = (line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if line.startswith("coco/"))
    return {key: float(value) for key, value in lines if key in METRICS}


@pytest.mark.parametrize(("kind", "suffix"), [("onnx", ".onnx"), ("openvino", ".xml")])
def test_a_whole_detector_scores_what_its_network_part_scores(
    kind: str, suffix: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(folder / "repapq.safetensors"), "--with-decoding", "--format", kind, "-w", str(tmp_path)]
    assert main(words) == 0
    whole = folder / f"repapq-detector{suffix}"
    origin = read_origin(whole)
    assert origin is not None and origin.decoding == Decoding(None, True) and origin.config == str(DETECTOR_W6A6)
    alone = _scores(capsys, str(whole), "-w", str(tmp_path))
    part = _scores(capsys, str(folder / f"repapq{suffix}"), "-w", str(tmp_path))
    assert alone.keys() == part.keys() and part["coco/bbox_mAP"] > 0.3
    assert all(alone[key] == pytest.approx(part[key], abs=0.001) for key in METRICS)
