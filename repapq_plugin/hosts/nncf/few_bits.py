"""Grids of fewer bits in NNCF's quantizers of 8: given to them before the calibration, carried by them afterwards."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.hosts.nncf._compat import BaseQuantizer, SymmetricQuantizer, decode_hook_name, hooks_of
from repapq_plugin.hosts.nncf.affine import put_first
from repapq_plugin.hosts.nncf.placement import PlacedWeight, Placement
from repapq_plugin.hosts.nncf.quantizers import CARRIER_BITS, carry, channel_axis, set_num_bits, set_qparams, step_of
from repapq_plugin.policy import bits_of
from repapq_plugin.quantizers.plan import LayerPlan
from repapq_plugin.quantizers.trace import Trace

HALF_RANGE_BITS = CARRIER_BITS - 1
"""Bits of a weight half of whose codes stay unused."""


def set_bits(placement: Placement, trace: Trace, config: RepAPQConfig) -> dict[str, LayerPlan]:
    """Give weights and the quantizers in front of layers their bits, over the ranges they have.

    Args:
        placement: Where NNCF's quantizers of 8 bits are.
        trace: What a forward pass of the float network showed.
        config: Says the bits.

    Returns:
        How each layer is quantized, by module path.
    """
    wanted = {name: bits_of(name, trace.layers[name].at_an_end, config) for name in placement.weights}
    plans: dict[str, LayerPlan] = {}
    for quantizer, sharing in _by_quantizer(placement).items():
        # Layers that share a weight share its quantizer: the one that needs most bits decides.
        weight_bits = max(wanted[name][0] for name in sharing)
        if uses_half_range(placement.weights[sharing[0]]):
            step = step_of(quantizer)
            set_num_bits(quantizer, HALF_RANGE_BITS)
            set_qparams(quantizer, step, torch.zeros_like(step))
            weight_bits = min(weight_bits, HALF_RANGE_BITS)
        set_num_bits(quantizer, weight_bits)
        plans |= {name: LayerPlan(weight_bits, CARRIER_BITS, None) for name in sharing}
    plans = {name: plans[name] for name in placement.weights}
    for group, activation in enumerate(placement.activations):
        if not activation.readers or channel_axis(activation.quantizer) is not None:
            continue
        # Layers that read the same tensor share its quantizer: the one that needs most bits decides.
        bits = max(wanted[name][1] for name in activation.readers)
        set_num_bits(activation.quantizer, bits)
        for name in activation.readers:
            plans[name] = replace(plans[name], activation_bits=bits, input_group=group)
    return plans


def _by_quantizer(placement: Placement) -> dict[BaseQuantizer, list[str]]:
    """Return the layers whose weight each quantizer rounds, by their module paths in call order."""
    found: dict[BaseQuantizer, list[str]] = {}
    for name, placed in placement.weights.items():
        found.setdefault(placed.quantizer, []).append(name)
    return found


@torch.no_grad()
def uses_half_range(placed: PlacedWeight) -> bool:
    """Whether NNCF left half of the codes of a weight unused, which keeps 16-bit sums of products from saturating."""
    quantizer = placed.quantizer
    if not isinstance(quantizer, SymmetricQuantizer):
        return False
    weight = cast(Tensor, placed.module.weight)
    axis = channel_axis(quantizer)
    largest = weight.abs().max() if axis is None else weight.abs().movedim(axis, 0).flatten(1).amax(1)
    reach = step_of(quantizer).flatten() * quantizer.level_high
    alive = largest.flatten() > 0
    return bool(alive.any()) and bool((reach[alive] > 1.5 * largest.flatten()[alive]).all())


@torch.no_grad()
def carry_few_bits(model: nn.Module, placement: Placement) -> None:
    """Turn every quantizer of few bits into one of 8 that makes the same codes."""
    for placed in placement.weights.values():
        weight = cast(Tensor, placed.module.weight)
        if placed.quantizer.num_bits < CARRIER_BITS:
            weight.copy_(placed.quantizer.quantize(weight))
        carry(placed.quantizer)
    for activation in placement.activations:
        clamp = carry(activation.quantizer)
        if clamp is None:
            continue
        for hook in activation.hooks:
            put_first(*hooks_of(model, *decode_hook_name(hook)), clamp)
