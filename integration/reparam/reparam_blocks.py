"""Random blocks of every known family, with norms as awkward as training can leave them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from mmpretrain.models.backbones.mobileone import MobileOneBlock as MMMobileOneBlock
from mmpretrain.models.backbones.repvgg import RepVGGBlock as MMPretrainRepVGGBlock
from mmpretrain.models.utils import SELayer
from mmyolo.models.layers.yolo_bricks import RepVGGBlock as MMYoloRepVGGBlock
from timm.layers import SqueezeExcite
from timm.models.byobnet import LayerFn
from timm.models.byobnet import MobileOneBlock as TimmMobileOneBlock
from timm.models.byobnet import RepVggBlock as TimmRepVggBlock
from torch import Tensor, nn

from repapq_plugin.reparam import Branch, BranchSpec
from tests.support.numerics import random_input, relative_error, set_norms

__all__ = ["FAMILIES", "TwoBranches", "random_input", "relative_error", "set_norms", "two_branches", "with_hard_norms"]

Draw = Callable[[st.SearchStrategy[Any]], Any]


def draw_width(draw: Draw) -> tuple[int, int, int]:
    """Input channels, output channels and groups that fit both."""
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    inputs = groups * draw(st.integers(1, 4))
    outputs = draw(st.sampled_from([inputs, inputs, 2 * inputs, groups * 3]))
    return inputs, outputs, groups


@st.composite
def mmyolo_repvgg(draw: Draw) -> nn.Module:
    inputs, outputs, groups = draw_width(draw)
    block = MMYoloRepVGGBlock(
        inputs,
        outputs,
        stride=draw(st.integers(1, 2)),
        groups=groups,
        use_alpha=draw(st.booleans()),
        use_bn_first=draw(st.booleans()),
        act_cfg=dict(type=draw(st.sampled_from(["ReLU", "SiLU", "Sigmoid"]))),
    )
    if draw(st.booleans()):
        block.se = SELayer(outputs, ratio=1)
    if block.alpha is not None:
        nn.init.constant_(block.alpha, draw(st.sampled_from([1.0, -0.3, 7.5, 0.0])))
    return block


@st.composite
def mmpretrain_repvgg(draw: Draw) -> nn.Module:
    inputs, outputs, groups = draw_width(draw)
    dilation = draw(st.integers(1, 3))
    return MMPretrainRepVGGBlock(
        inputs,
        outputs,
        stride=draw(st.integers(1, 2)),
        padding=dilation,
        dilation=dilation,
        groups=groups,
        se_cfg=draw(st.sampled_from([None, dict(ratio=1)])),
    )


@st.composite
def mmpretrain_mobileone(draw: Draw) -> nn.Module:
    inputs, outputs, groups = draw_width(draw)
    kernel, dilation = draw(st.sampled_from([1, 3, 5])), draw(st.integers(1, 2))
    return MMMobileOneBlock(
        inputs,
        outputs,
        kernel_size=kernel,
        num_convs=draw(st.integers(1, 4)),
        stride=draw(st.integers(1, 2)),
        padding=dilation * (kernel // 2),
        dilation=dilation,
        groups=groups,
        se_cfg=draw(st.sampled_from([None, dict(ratio=1)])),
    )


def _timm_layers(draw: Draw) -> LayerFn:
    attention = partial(SqueezeExcite, rd_ratio=1.0) if draw(st.booleans()) else None
    return LayerFn(attn=attention, act=draw(st.sampled_from([nn.ReLU, nn.SiLU])))


@st.composite
def timm_repvgg(draw: Draw) -> nn.Module:
    inputs, outputs, groups = draw_width(draw)
    dilation = draw(st.integers(1, 2))
    return TimmRepVggBlock(
        inputs,
        outputs,
        kernel_size=draw(st.sampled_from([3, 5])),
        stride=draw(st.integers(1, 2)),
        dilation=(dilation, dilation),
        group_size=None if groups == 1 else inputs // groups,
        layers=_timm_layers(draw),
        drop_path_rate=draw(st.sampled_from([0.0, 0.2])),
    )


@st.composite
def timm_mobileone(draw: Draw) -> nn.Module:
    inputs, outputs, groups = draw_width(draw)
    return TimmMobileOneBlock(
        inputs,
        outputs,
        kernel_size=draw(st.sampled_from([1, 3, 5])),
        stride=draw(st.integers(1, 2)),
        group_size=None if groups == 1 else inputs // groups,
        num_conv_branches=draw(st.integers(1, 4)),
        layers=_timm_layers(draw),
        drop_path_rate=draw(st.sampled_from([0.0, 0.2])),
    )


FAMILIES = {
    "mmyolo RepVGG": mmyolo_repvgg(),
    "mmpretrain RepVGG": mmpretrain_repvgg(),
    "mmpretrain MobileOne": mmpretrain_mobileone(),
    "timm RepVGG": timm_repvgg(),
    "timm MobileOne": timm_mobileone(),
}


@st.composite
def with_hard_norms(draw: Draw, block: st.SearchStrategy[nn.Module]) -> nn.Module:
    """A block in inference mode, its norms' statistics anywhere from tame to absurd."""
    seed = draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    module = draw(block)
    low, high = sorted(draw(st.tuples(st.integers(-12, 4), st.integers(-12, 4))))
    set_norms(module, seed, low, high, draw(st.sampled_from([0.0, 1.0, 100.0])))
    return module.eval()


class TwoBranches(nn.Module):
    """A foreign block: 3x3 + 1x1, each with a norm, + the input itself."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn3(self.conv3(x)) + self.bn1(self.conv1(x)) + x)


def two_branches(block: TwoBranches) -> BranchSpec:
    """Describe `TwoBranches` as a user would."""
    return BranchSpec(
        branches=(Branch((block.conv3, block.bn3)), Branch((block.conv1, block.bn1)), Branch(())),
        after=(block.act,),
    )
