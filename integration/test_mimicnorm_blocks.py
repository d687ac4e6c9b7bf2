"""Blocks of a toolbox, converted to MimicNorm, merge by addition and calibrate as ever."""

from __future__ import annotations

import pytest
import torch
from mmpretrain.models.backbones.mobileone import MobileOneBlock
from mmpretrain.models.backbones.repvgg import RepVGGBlock
from torch import nn

from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.mimicnorm import convert
from repapq_plugin.mimicnorm.layers import LastBatchNorm, MimicNorm2d


def images() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


class Blocks(nn.Module):
    """A stem, reparameterizable blocks, a classifier."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(kind(8, 16, stride=2), kind(16, 16), kind(16, 16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.blocks(torch.relu(self.stem(x))).mean(dim=(2, 3)))


def branched_blocks() -> list[type[nn.Module]]:
    class MobileOne(MobileOneBlock):
        def __init__(self, inputs, outputs, stride=1):
            super().__init__(inputs, outputs, 3, num_convs=2, stride=stride)

    return [RepVGGBlock, MobileOne]


@pytest.mark.parametrize("which", [0, 1])
def test_branches_merge_by_addition_and_calibrate_as_ever(which):
    torch.manual_seed(0)
    model = Blocks(branched_blocks()[which])
    converted = convert(model, images()).model.eval()
    assert len(norms(converted)) == 1
    with torch.no_grad():
        for module in converted.modules():
            if isinstance(module, MimicNorm2d) and module.bias is not None:
                module.bias.normal_()
    data = [images()]
    result = quantize_model(converted, data, RepAPQConfig.from_preset("w8a8", steps=5))
    assert len(result.merges) == 3
    assert not [m for m in result.model.modules() if isinstance(m, MimicNorm2d | LastBatchNorm)]
    with torch.no_grad():
        wanted = converted(data[0])
        assert (result.model(data[0]) - wanted).abs().mean() < 0.05 * wanted.abs().mean()
