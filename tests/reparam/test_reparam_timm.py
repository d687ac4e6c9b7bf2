"""Families of timm: every block and a small network of each, merged by what their forward computes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from timm.models.efficientvim import EfficientViM, EfficientViMBlock, PatchMerging
from timm.models.fastvit import FastVit, MobileOneBlock, ReparamLargeKernelConv, RepConditionalPosEnc, RepMixer
from timm.models.ghostnet import GhostBottleneckV3, GhostModuleV3, GhostNet
from timm.models.iformer import IFormer, RepCPE
from timm.models.lcnetv2 import LCNetV2, RepDepthwiseSeparable
from timm.models.repghost import RepGhostModule, RepGhostNet
from timm.models.repvit import RepVggDw, RepVit
from timm.models.shvit import Conv2dNorm, Residual, SHViT
from torch import nn

from repapq_plugin.core.tensors import tensors_of
from repapq_plugin.reparam import MergedBlock, find_unknown_multibranch, merge_branches
from tests.support.numerics import random_input, relative_error, set_norms

# Each with the number of convolutions that its branches become.
BLOCKS: dict[str, tuple[nn.Module, int]] = {
    "RepViT": (RepVggDw(4, 3), 1),
    "RepViT, legacy": (RepVggDw(4, 3, legacy=True), 1),
    "FastViT MobileOne": (MobileOneBlock(4, 4, 3, num_conv_branches=2, use_se=True), 1),
    "FastViT MobileOne, strided": (MobileOneBlock(4, 8, 5, stride=2, group_size=1), 1),
    "FastViT RepMixer": (RepMixer(4, layer_scale_init_value=0.7), 1),
    "FastViT RepMixer without layer scale": (RepMixer(4, layer_scale_init_value=None), 1),
    "FastViT large kernel": (ReparamLargeKernelConv(4, 8, 7, 2, 1, small_kernel=3, use_se=True, act_layer=nn.GELU), 1),
    "FastViT positional encoding": (RepConditionalPosEnc(4), 1),
    "RepGhost": (RepGhostModule(4, 6), 1),
    "RepGhost without activation": (RepGhostModule(4, 6, relu=False), 1),
    "GhostNet v3": (GhostModuleV3(4, 8), 2),
    "GhostNet v3 with shortcut": (GhostModuleV3(4, 8, mode="shortcut"), 2),
    "GhostNet v3 bottleneck": (GhostBottleneckV3(4, 8, 6, stride=2), 5),
    "LCNetV2": (RepDepthwiseSeparable(4, 8, stride=1, dw_kernel_size=5, use_rep=True), 1),
    "LCNetV2, strided": (RepDepthwiseSeparable(4, 8, stride=2, dw_kernel_size=5, use_rep=True, use_se=True), 1),
    "iFormer positional encoding": (RepCPE(4), 1),
    "SHViT": (Residual(Conv2dNorm(4, 4, 3, 1, 1, groups=4)), 1),
    "EfficientViM": (EfficientViMBlock(4, state_dim=3), 2),
}

GHOST = [[[3, 16, 16, 0, 1]], [[3, 32, 24, 0, 2]], [[5, 48, 24, 0.25, 1]], [[3, 48, 32, 0, 2]]]

NETWORKS = {
    "RepViT": partial(RepVit, embed_dim=(8, 16), depth=(2, 1)),
    "FastViT": partial(
        FastVit,
        layers=(1, 1, 1, 1),
        embed_dims=(8, 8, 16, 32),
        token_mixers=("repmixer", "repmixer", "repmixer", "attention"),
        pos_embs=(None, None, None, partial(RepConditionalPosEnc, spatial_shape=(7, 7))),
    ),
    "RepGhost": partial(RepGhostNet, cfgs=GHOST, width=0.5),
    "GhostNet v3": partial(GhostNet, cfgs=GHOST, width=0.5, version="v3"),
    "LCNetV2": partial(LCNetV2, scale=0.25, depths=(1, 1, 1, 1), head_hidden_size=16),
    "iFormer": partial(
        IFormer,
        dims=(8, 8, 16, 32),
        depths=(1, 1, 3, 3),
        attn_groups=(0, 0, 1, 1),
        attn_head_dim_reduction=(0, 0, 2, 4),
    ),
    "SHViT": partial(SHViT, embed_dim=(16, 24, 32), partial_dim=(4, 8, 8), depth=(1, 1, 1), types=("i", "s", "s")),
    "EfficientViM": partial(EfficientViM, embed_dim=(16, 24, 32), depths=(1, 1, 1), state_dim=(5, 4, 3)),
}


def convolutions_wanted(model: nn.Module) -> int:
    """How many convolutions the branches of a network of timm become, by its own classes."""
    inside = {inner for module in model.modules() if isinstance(module, RepMixer) for inner in module.children()}
    wanted = 0
    for module in model.modules():
        one_each = (RepVggDw, RepMixer, ReparamLargeKernelConv, RepConditionalPosEnc, RepGhostModule, RepCPE)
        wanted += isinstance(module, one_each)
        wanted += isinstance(module, MobileOneBlock) and module not in inside
        wanted += 2 * isinstance(module, GhostModuleV3 | EfficientViMBlock | PatchMerging)
        wanted += isinstance(module, GhostBottleneckV3) and module.stride > 1
        wanted += isinstance(module, RepDepthwiseSeparable) and len(module.dw_conv_list or ()) > 1
        wanted += isinstance(module, Residual) and isinstance(module.m, Conv2dNorm)
    return wanted


def prepared(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model.eval()
    set_norms(model, seed=0, low=-1, high=1, mean=1)
    for name, parameter in model.named_parameters():
        if "alpha" in name:  # gates start so small that they would hide what they gate
            nn.init.normal_(parameter)
    return model


def blocks_in(model: nn.Module) -> int:
    return sum(isinstance(module, MergedBlock) for module in model.modules())


@pytest.mark.parametrize(
    ("dtype", "bound"), [pytest.param(torch.float32, 1e-5, marks=pytest.mark.slow), (torch.float64, 1e-12)]
)
@pytest.mark.parametrize("name", BLOCKS)
def test_block_is_merged_exactly(name: str, dtype: torch.dtype, bound: float) -> None:
    block, count = BLOCKS[name]
    model = nn.Sequential(prepared(block).to(dtype))
    merged, records = merge_branches(model)
    assert records and all(record.merged for record in records)
    assert blocks_in(merged) == count
    for size in ((16, 12), (32, 20)):
        x = random_input(4, size=size).to(dtype)
        with torch.no_grad():
            pairs = zip(tensors_of(merged(x.clone())), tensors_of(model(x.clone())), strict=True)
            assert max(relative_error(actual, wanted) for actual, wanted in pairs) <= bound
    assert find_unknown_multibranch(merged, lambda net: net(x)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_network_is_merged_exactly_and_no_branches_are_left(name: str) -> None:
    model = prepared(NETWORKS[name](num_classes=5)).double()
    merged, records = merge_branches(model)
    assert [record.name for record in records if not record.merged] == []
    assert blocks_in(merged) == convolutions_wanted(model) > 0
    x = random_input(3, size=(64, 64))
    with torch.no_grad():
        assert relative_error(merged(x), model(x)) <= 1e-10
    assert find_unknown_multibranch(merged, lambda net: net(x)) == []
