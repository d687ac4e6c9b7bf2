"""QPR's affine layer among NNCF's hooks: behind a layer during calibration, in its weight's scales afterwards."""

from __future__ import annotations

import torch
from nncf.torch.function_hook import get_hook_storage
from nncf.torch.function_hook.hook_storage import HookStorage
from nncf.torch.quantization.layers import SymmetricQuantizer
from torch import nn

from repapq_plugin.hosts.nncf.placement import PlacedWeight
from repapq_plugin.hosts.nncf.quantizers import channel_axis, set_qparams, step_of
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
    layer = placed.module
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    channels = weight.shape[output_channels_axis(layer)]
    affine = ChannelAffine(channels, channels_last=isinstance(layer, nn.Linear), like=weight)
    for operation in placed.operations:
        put_first(get_hook_storage(model).post_hooks, HookStorage._generate_key(operation, 0), affine)
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

    Codes stay what they were but for the sign of gamma, so the layer computes what it did.
    """
    layer, quantizer = placed.module, placed.quantizer
    for operation in placed.operations:
        take_out(get_hook_storage(model).post_hooks, HookStorage._generate_key(operation, 0), affine)
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    bias: torch.Tensor = layer.bias  # type: ignore[assignment]
    shape = [1] * weight.dim()
    shape[output_channels_axis(layer)] = -1
    gamma = affine.gamma.reshape(shape)
    step = step_of(quantizer)
    weight.mul_(gamma)
    bias.mul_(affine.gamma).add_(affine.beta)
    set_qparams(quantizer, step * gamma.abs().reshape(step.shape), torch.zeros_like(step))
