"""Networks for small images, each with batch norms, with MimicNorm, or with no norms at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.models.byobnet import MobileOneBlock, RepVggBlock
from torch import Tensor, nn
from torchvision.models import VGG, ResNet, ShuffleNetV2
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import make_layers

from repapq_plugin.mimicnorm import MimicNorm2d, Recipe, convert
from repapq_plugin.reparam import QARepVGGBlock

CLASSES = 10
METHODS = ("batch norm", "MimicNorm", "no norm")


def resnet18(width: int = 8, channels: int = 1, stride: int = 2) -> nn.Module:
    """Return torchvision's ResNet-18 with a stem for small images and ``width`` in place of 64 channels."""
    model = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=CLASSES)
    model.inplanes = width
    model.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
    model.bn1 = nn.BatchNorm2d(width)
    model.maxpool = nn.Identity()  # type: ignore[assignment]
    for stage in range(4):
        layer = model._make_layer(BasicBlock, width << stage, 2, stride=1 if stage == 0 else 2)
        setattr(model, f"layer{stage + 1}", layer)
    model.fc = nn.Linear(width << 3, CLASSES)
    return model


def shufflenet_v2(widths: tuple[int, ...] = (16, 32, 64, 128, 192), channels: int = 1, stride: int = 2) -> nn.Module:
    """Return torchvision's ShuffleNetV2 with half its units and ``widths`` of stem, stages and last convolution."""
    model = ShuffleNetV2([2, 4, 2], list(widths), num_classes=CLASSES)
    model.conv1[0] = nn.Conv2d(channels, widths[0], 3, stride=stride, padding=1, bias=False)
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


def repvgg(
    width: int = 16, block: Callable[..., nn.Module] = RepVggBlock, channels: int = 1, stride: int = 2
) -> nn.Module:
    """Return a RepVGG of 8 blocks, stride 2 at the first of each stage.

    Args:
        width: Channels of the stem.
        block: ``block(in_channels, out_channels, stride=...)``.
        channels: Of the images.
        stride: Of the stem.
    """
    plan = [(channels, width, stride), (width, 2 * width, 2), *[(2 * width, 2 * width, 1)] * 2]
    plan += [(2 * width, 4 * width, 2), *[(4 * width, 4 * width, 1)] * 2, (4 * width, 8 * width, 1)]
    blocks = [block(in_channels, out_channels, stride=stride) for in_channels, out_channels, stride in plan]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, CLASSES))


def qarepvgg() -> nn.Module:
    """Return the RepVGG with QARepVGG's blocks."""
    return repvgg(block=QARepVGGBlock)


def mobileone(width: int = 32, branches: int = 2) -> nn.Module:
    """Return a MobileOne of 8 pairs of a depthwise and a pointwise block, for photographs of 32 x 32 pixels.

    Args:
        width: Channels of the stem.
        branches: Convolutions side by side in each block, besides its 1x1 and its identity.
    """
    plan = [(width, 2 * width, 1), *[(2 * width, 2 * width, 1)] * 1, (2 * width, 4 * width, 2)]
    plan += [*[(4 * width, 4 * width, 1)] * 3, (4 * width, 8 * width, 2), (8 * width, 8 * width, 1)]
    blocks: list[nn.Module] = [MobileOneBlock(3, width)]
    for in_channels, out_channels, stride in plan:
        blocks.append(MobileOneBlock(in_channels, in_channels, stride=stride, group_size=1, num_conv_branches=branches))
        blocks.append(MobileOneBlock(in_channels, out_channels, kernel_size=1, num_conv_branches=branches))
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, CLASSES))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": resnet18,
    "ShuffleNetV2": shufflenet_v2,
    "VGG": vgg,
    "RepVGG": repvgg,
    "QARepVGG": qarepvgg,
}

PHOTOGRAPH_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": lambda: resnet18(width=32, channels=3, stride=1),
    "ShuffleNetV2": lambda: shufflenet_v2((24, 116, 232, 464, 1024), channels=3, stride=1),
    "RepVGG": lambda: repvgg(width=32, channels=3, stride=1),
    "MobileOne": mobileone,
}
"""For 32 x 32 pixels of three colours; the ShuffleNetV2 has the widths of its usual size, 1x."""


def build(
    network: str,
    method: str,
    example: Tensor,
    recipe: Recipe | str = "default",
    networks: Mapping[str, Callable[[], nn.Module]] = NETWORKS,
) -> nn.Module:
    """Return a network with new weights, ready to be trained.

    Args:
        network: A key of ``networks``.
        method: One of `METHODS`.
        example: Training images, ``(N, C, H, W)``.
        recipe: Of a training with MimicNorm.
        networks: `NETWORKS` or `PHOTOGRAPH_NETWORKS`.
    """
    model = networks[network]()
    if method == "batch norm":
        return model
    if method == "MimicNorm":
        return convert(model, example, recipe=recipe).model
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
