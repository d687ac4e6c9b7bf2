"""Detectors of ultralytics, from the files that describe them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from ultralytics.nn.modules.block import RepVGGDW
from ultralytics.nn.modules.conv import RepConv
from ultralytics.nn.tasks import DetectionModel, RTDETRDetectionModel

from integration.libraries.contract import LearningContract, LibraryContract
from integration.libraries.networks import NOT_CALLED, Network


def yolo(config: str) -> Callable[[], nn.Module]:
    return lambda: DetectionModel(config, ch=3, nc=4, verbose=False)


def rtdetr() -> nn.Module:
    return RTDETRDetectionModel("rtdetr-l.yaml", ch=3, nc=4, verbose=False)


def heads(network: nn.Module, images: Tensor) -> object:
    """Boxes and scores as the convolutions of one head give them, or of two."""
    found = network(images)[1]
    return [(head["boxes"], head["scores"]) for head in (found.values() if "one2one" in found else [found])]


def queries(network: nn.Module, images: Tensor) -> object:
    """Boxes and scores of the decoder, and of the encoder in front of it."""
    return network(images)[1]


# Boxes are also decoded, by a convolution whose output is not among the raw ones: `whole`.
YOLO_V9T = Network(yolo("yolov9t.yaml"), heads, blocks=(RepConv,), whole=True)


class TestUltralytics(LibraryContract):
    networks = {
        "yolov8n": Network(yolo("yolov8n.yaml"), heads, whole=True),
        "yolov9t": YOLO_V9T,
        "yolov10n": Network(yolo("yolov10n.yaml"), heads, blocks=(RepVGGDW,), whole=True),
        "yolo11n": Network(yolo("yolo11n.yaml"), heads, whole=True),
        "yolo26n": Network(yolo("yolo26n.yaml"), heads, whole=True),
        "rtdetr-l": Network(
            rtdetr,
            queries,
            blocks=(RepConv,),
            unordered=True,
            stays_float={
                "model.11.ma": "MultiheadAttention runs in float",
                "model.28.decoder.layers.*.self_attn": "MultiheadAttention runs in float",
                "*.out_proj": NOT_CALLED,
                "model.28.denoising_class_embed": "Embedding runs in float",
                "model.28.dec_score_head.?": NOT_CALLED,  # only the last one answers at inference
            },
        ),
    }


class TestLearnedUltralytics(LearningContract):
    networks = {"yolov9t": YOLO_V9T}
