"""The block families known from the start, each read through its own attributes.

They are registered by name, so that no host is imported. A block that is already in its deployed
form (one convolution) has no branches to merge and answers None.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor, nn

from repapq_plugin.errors import MergeError
from repapq_plugin.reparam.branches import BlockFunction, Branch, BranchSpec, register_branches


class _ConvModule(Protocol):
    """What is read of an mmcv ``ConvModule``."""

    conv: nn.Module
    norm: nn.Module
    with_norm: bool
    with_activation: bool
    order: tuple[str, ...]


class _ConvNormAct(Protocol):
    """What is read of a timm ``ConvNormAct``."""

    conv: nn.Module
    bn: nn.Module


class _MMYoloRepVGG(Protocol):
    rbr_dense: _ConvModule
    rbr_1x1: _ConvModule
    rbr_identity: nn.Module | None
    alpha: Tensor | None
    se: nn.Module | None
    nonlinearity: nn.Module


class _MMPretrainRepVGG(Protocol):
    branch_3x3: Iterable[nn.Module]
    branch_1x1: Iterable[nn.Module]
    branch_norm: nn.Module | None
    se_layer: nn.Module | None
    act: nn.Module


class _MMPretrainMobileOne(Protocol):
    branch_conv_list: Iterable[Iterable[nn.Module]]
    branch_scale: Iterable[nn.Module] | None
    branch_norm: nn.Module | None
    se: nn.Module | None
    act: nn.Module


class _TimmBlock(Protocol):
    identity: nn.Module | None
    attn: nn.Module | None
    act: nn.Module
    reparam_conv: nn.Module | None


class _TimmRepVGG(_TimmBlock, Protocol):
    conv_kxk: _ConvNormAct
    conv_1x1: _ConvNormAct


class _TimmMobileOne(_TimmBlock, Protocol):
    conv_kxk: Iterable[_ConvNormAct]
    conv_scale: _ConvNormAct | None


def _present(*modules: nn.Module | None) -> tuple[nn.Module, ...]:
    return tuple(module for module in modules if module is not None)


def _branches(*members: Iterable[nn.Module] | None) -> tuple[Branch, ...]:
    return tuple(Branch(tuple(layers)) for layers in members if layers is not None)


def _alone(norm: nn.Module | None) -> tuple[nn.Module, ...] | None:
    return None if norm is None else (norm,)


def _conv_module(module: _ConvModule) -> tuple[nn.Module, ...]:
    """Layers of an mmcv ``ConvModule`` without activation, in the order in which it runs them."""
    if module.with_activation:
        raise MergeError("A ConvModule with an activation stands in a branch, which is then not linear.")
    parts = {
        "conv": _present(getattr(module, "padding_layer", None), module.conv),
        "norm": _present(module.norm) if module.with_norm else (),
    }
    return tuple(layer for part in module.order for layer in parts.get(part, ()))


def _conv_norm_act(module: _ConvNormAct) -> tuple[nn.Module, ...]:
    """Layers of a timm ``ConvNormAct`` whose activation is switched off."""
    return _present(module.conv, module.bn, getattr(module, "aa", None))


def mmyolo_repvgg(block: _MMYoloRepVGG) -> BranchSpec | None:
    """YOLOv6, YOLOv7 and PP-YOLOE: 3x3 + [alpha *] 1x1 [+ normalised identity]."""
    if hasattr(block, "rbr_reparam"):
        return None
    # The block itself tests alpha for truth: at exactly zero it adds the unscaled 1x1 branch.
    alpha = block.alpha if block.alpha is not None and bool(block.alpha) else 1.0
    branches = (
        Branch(_conv_module(block.rbr_dense)),
        Branch(_conv_module(block.rbr_1x1), scale=alpha),
        *_branches(_alone(block.rbr_identity)),
    )
    return BranchSpec(branches, after=_present(block.se, block.nonlinearity))


def mmpretrain_repvgg(block: _MMPretrainRepVGG) -> BranchSpec | None:
    """RepVGG of mmpretrain: 3x3 + 1x1 [+ normalised identity], then squeeze-excite, then activation."""
    if hasattr(block, "branch_reparam"):
        return None
    branches = _branches(block.branch_3x3, block.branch_1x1, _alone(block.branch_norm))
    return BranchSpec(branches, after=_present(block.se_layer, block.act))


def mmpretrain_mobileone(block: _MMPretrainMobileOne) -> BranchSpec | None:
    """MobileOne of mmpretrain: n * kxk [+ 1x1] [+ normalised identity], then squeeze-excite, activation."""
    if hasattr(block, "branch_reparam"):
        return None
    branches = _branches(*block.branch_conv_list, block.branch_scale, _alone(block.branch_norm))
    return BranchSpec(branches, after=_present(block.se, block.act))


def timm_repvgg(block: _TimmRepVGG) -> BranchSpec | None:
    """RepVGG of timm: kxk + 1x1 [+ normalised identity], then attention, then activation."""
    if block.reparam_conv is not None:
        return None
    branches = _branches(_conv_norm_act(block.conv_kxk), _conv_norm_act(block.conv_1x1), _alone(block.identity))
    return BranchSpec(branches, after=_present(block.attn, block.act))


def timm_mobileone(block: _TimmMobileOne) -> BranchSpec | None:
    """MobileOne of timm: n * kxk [+ 1x1] [+ normalised identity], then attention, then activation."""
    if block.reparam_conv is not None:
        return None
    scale = None if block.conv_scale is None else _conv_norm_act(block.conv_scale)
    branches = _branches(*map(_conv_norm_act, block.conv_kxk), scale, _alone(block.identity))
    return BranchSpec(branches, after=_present(block.attn, block.act))


FAMILIES: dict[str, BlockFunction] = {
    "mmyolo.models.layers.yolo_bricks.RepVGGBlock": mmyolo_repvgg,
    "mmpretrain.models.backbones.repvgg.RepVGGBlock": mmpretrain_repvgg,
    "mmpretrain.models.backbones.mobileone.MobileOneBlock": mmpretrain_mobileone,
    "timm.models.byobnet.RepVggBlock": timm_repvgg,
    "timm.models.byobnet.MobileOneBlock": timm_mobileone,
}

# Classes of one convolution beside the identity, which their authors merge as well. In a class that
# is not named here that is an ordinary residual block, and stays one.
TAKE_IDENTITY = frozenset(
    {
        "mmpretrain.models.backbones.riformer.Affine",
        "timm.models.efficientvim.EfficientViMBlock",
        "timm.models.efficientvim.PatchMerging",
        "timm.models.fastvit.RepConditionalPosEnc",
        "timm.models.iformer.Residual",
        "timm.models.shvit.Residual",
    }
)


def register_families() -> None:
    """Teach every family of this file; doing it again changes nothing."""
    for name, function in FAMILIES.items():
        register_branches(name, function)
