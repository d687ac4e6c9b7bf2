"""Narrow networks for 28 x 28 pixels, each with batch norms, with MimicNorm, or with no norms at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models.byobnet import RepVggBlock
from torch import Tensor, nn
from torchvision.models import VGG, ResNet, ShuffleNetV2
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import make_layers

from repapq_plugin.mimicnorm import MimicNorm2d, convert
from repapq_plugin.reparam import QARepVGGBlock

CLASSES = 10
METHODS = ("batch norm", "MimicNorm", "no norm")


def resnet18(width: int = 8) -> nn.Module:
    """Return torchvision's ResNet-18 with a stem for small images and ``width`` in place of 64 channels."""
    model = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=CLASSES)
    model.inplanes = width
    model.conv1 = nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False)
    model.bn1 = nn.BatchNorm2d(width)
    model.maxpool = nn.Identity()  # type: ignore[assignment]
    for stage in range(4):
        layer = model._make_layer(BasicBlock, width << stage, 2, stride=1 if stage == 0 else 2)
        setattr(model, f"layer{stage + 1}", layer)
    model.fc = nn.Linear(width << 3, CLASSES)
    return model


def shufflenet_v2() -> nn.Module:
    """Return torchvision's ShuffleNetV2 with half its units and narrower ones."""
    channels = [16, 32, 64, 128, 192]
    model = ShuffleNetV2([2, 4, 2], channels, num_classes=CLASSES)
    model.conv1[0] = nn.Conv2d(1, channels[0], 3, stride=2, padding=1, bias=False)
    model.maxpool = nn.Identity()  # type: ignore[assignment]
    return model


def vgg(width: int = 16) -> nn.Module:
    """Return torchvision's VGG with seven convolutions and one linear layer behind an average."""
    plan: list[str | int] = [width, "M", *[2 * width] * 2, "M", *[4 * width] * 2, "M", *[8 * width] * 2]
    model = VGG(make_layers(plan, batch_norm=True), num_classes=CLASSES, init_weights=False)
    model.features[0] = nn.Conv2d(1, width, 3, stride=2, padding=1)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Linear(8 * width, CLASSES)  # type: ignore[assignment]
    return model


def repvgg(width: int = 16, block: Callable[..., nn.Module] = RepVggBlock) -> nn.Module:
    """Return a RepVGG of 8 blocks, stride 2 at the first of each stage.

    Args:
        width: Channels of the stem.
        block: ``block(in_channels, out_channels, stride=...)``.
    """
    plan = [(1, width, 2), (width, 2 * width, 2), *[(2 * width, 2 * width, 1)] * 2]
    plan += [(2 * width, 4 * width, 2), *[(4 * width, 4 * width, 1)] * 2, (4 * width, 8 * width, 1)]
    blocks = [block(in_channels, out_channels, stride=stride) for in_channels, out_channels, stride in plan]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, CLASSES))


def qarepvgg() -> nn.Module:
    """Return the RepVGG with QARepVGG's blocks."""
    return repvgg(block=QARepVGGBlock)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": resnet18,
    "ShuffleNetV2": shufflenet_v2,
    "VGG": vgg,
    "RepVGG": repvgg,
    "QARepVGG": qarepvgg,
}


def build(network: str, method: str, example: Tensor) -> nn.Module:
    """Return a network with new weights, ready to be trained.

    Args:
        network: A key of `NETWORKS`.
        method: One of `METHODS`.
        example: Training images, ``(N, 1, 28, 28)``.
    """
    model = NETWORKS[network]()
    if method == "batch norm":
        return model
    if method == "MimicNorm":
        return convert(model, example).model
    without_norms(model)
    return model


@torch.no_grad()
def without_norms(model: nn.Module) -> None:
    """Put a bias per channel in the place of each batch norm, and draw He-normal weights."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, MimicNorm2d(child.num_features))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            he_normal(layer)


def he_normal(layer: Any) -> None:
    """Draw weights as plain rectified networks want them; biases start at zero."""
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
