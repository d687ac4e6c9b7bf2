"""Detectors and segmenters of torchvision, without weights."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models import detection, segmentation

from integration.libraries.contract import LibraryContract
from integration.libraries.networks import Network

UNTRAINED = {"weights": None, "weights_backbone": None, "num_classes": 4}

BOXES = torch.tensor([[x, y, x + 32.0, y + 40.0] for x in (0.0, 20.0, 50.0) for y in (0.0, 15.0, 40.0)])
"""Regions of an image, in pixels, float ``(9, 4)``."""


def maps(network: nn.Module, images: Tensor) -> object:
    return network(images)["out"]


def dense_head(network: nn.Module, images: Tensor) -> object:
    """Scores and boxes of every anchor."""
    return network.head(list(network.backbone(images).values()))


def both_stages(network: nn.Module, images: Tensor) -> object:
    """Scores and boxes of every anchor, and of some fixed regions."""
    features = network.backbone(images)
    sizes = [tuple(images.shape[-2:])] * len(images)
    regions = network.roi_heads.box_roi_pool(features, [BOXES] * len(images), sizes)
    answers = network.roi_heads.box_predictor(network.roi_heads.box_head(regions))
    return network.rpn.head(list(features.values())), answers


class TestTorchvision(LibraryContract):
    networks = {
        "ssdlite": Network(partial(detection.ssdlite320_mobilenet_v3_large, **UNTRAINED), dense_head, size=(96, 96)),
        "faster_rcnn": Network(
            partial(detection.fasterrcnn_mobilenet_v3_large_320_fpn, **UNTRAINED), both_stages, size=(96, 96)
        ),
        "retinanet": Network(partial(detection.retinanet_resnet50_fpn, **UNTRAINED), dense_head, size=(32, 32)),
        "deeplab_v3": Network(partial(segmentation.deeplabv3_mobilenet_v3_large, **UNTRAINED), maps, size=(48, 48)),
        "lraspp": Network(partial(segmentation.lraspp_mobilenet_v3_large, **UNTRAINED), maps),
    }
