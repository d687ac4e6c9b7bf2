"""QPR's affine layer among NNCF's hooks: behind a layer during calibration, in its weight's scales afterwards."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from repapq_plugin.hosts.nncf._compat import SymmetricQuantizer, hooks_of
from repapq_plugin.hosts.nncf.placement import PlacedWeight
from repapq_plugin.hosts.nncf.quantizers import channel_axis, set_qparams, step_of
from repapq_plugin.method.qpr import affine_for, folded_bias, folded_scale
from repapq_plugin.quantizers.layers import ChannelAffine, output_channels_axis


def can_take_affine(placed: PlacedWeight) -> bool:
    """Whether an affine layer behind the layer can be folded: a bias, and a symmetric grid per output channel."""
    quantizer, layer = placed.quantizer, placed.module
    grouped = isinstance(layer, nn.ConvTranspose2d) and layer.groups > 1
    return (
        isinstance(quantizer, SymmetricQuantizer)
        and quantizer.level_low == -quantizer.level_high
        and channel_axis(quantizer) == output_channels_axis(layer)
        and layer.bias is not None
        and not grouped
    )


def attach_affine(model: nn.Module, placed: PlacedWeight) -> ChannelAffine:
    """Put an identity affine layer behind every call of a layer, in front of what NNCF hooked there."""
    affine = affine_for(placed.module)
    for operation in placed.operations:
        put_first(*hooks_of(model, "post_hooks", operation, 0), affine)
    return affine


def put_first(hooks: nn.ModuleDict, key: str, hook: nn.Module) -> None:
    """Insert a hook that runs before those that are there."""
    others = list(hooks[key].values()) if key in hooks else []  # type: ignore[operator]
    hooks[key] = nn.ModuleDict({str(index): each for index, each in enumerate([hook, *others])})


def take_out(hooks: nn.ModuleDict, key: str, hook: nn.Module) -> None:
    """Remove a hook, and leave the others as if it had never been."""
    others = [each for each in hooks[key].values() if each is not hook]  # type: ignore[operator]
    if others:
        hooks[key] = nn.ModuleDict({str(index): each for index, each in enumerate(others)})
    else:
        del hooks[key]


@torch.no_grad()
def fold_affine(model: nn.Module, placed: PlacedWeight, affine: ChannelAffine) -> None:
    """Take the affine layer out: ``weight <- gamma * weight``, ``scale <- |gamma| * scale``, the bias likewise.

    Codes stay what they were but for the sign of gamma, so the layer computes what it did. A weight in the very middle
    of two codes may round the other way once it is multiplied: it is put on its code.
    """
    layer, quantizer = placed.module, placed.quantizer
    for operation in placed.operations:
        take_out(*hooks_of(model, "post_hooks", operation, 0), affine)
    weight, bias = cast(Tensor, layer.weight), cast(Tensor, layer.bias)
    shape = [1] * weight.dim()
    shape[output_channels_axis(layer)] = -1
    gamma, step = affine.gamma.reshape(shape), step_of(quantizer)
    codes = _codes(weight, quantizer) * gamma.sign()
    weight.mul_(gamma)
    bias.copy_(folded_bias(affine, bias))
    set_qparams(quantizer, folded_scale(affine, step.flatten()).reshape(step.shape), torch.zeros_like(step))
    moved = _codes(weight, quantizer) != codes
    weight.copy_(torch.where(moved, codes * step_of(quantizer), weight))


def _codes(weight: Tensor, quantizer: SymmetricQuantizer) -> Tensor:
    """Return the integers, float of the weight's shape, to which NNCF rounds a weight."""
    return torch.round(quantizer.quantize(weight) / step_of(quantizer))
