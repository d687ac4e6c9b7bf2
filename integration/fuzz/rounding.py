"""What a quantized network is held against: plain rounding of the same layers, and itself with disturbed sums."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repapq_plugin import CalibrationResult
from repapq_plugin.core.copies import own_batch, own_copy
from repapq_plugin.core.running import call_model
from repapq_plugin.targets import Target

DISTURBED = 1e-6
"""What sums are multiplied by besides 1: two orders of addition differ by as much."""


def plainly_rounded(network: nn.Module, result: CalibrationResult, batches: list[object]) -> nn.Module:
    """Return a merged float network whose quantized layers round weights and inputs to min-max ranges.

    Args:
        network: Merged and folded.
        result: Says which layers are quantized, and with how many bits.
        batches: Those that the ranges hold.
    """
    made, target = own_copy(network), result.config.runs_on
    layers, added = dict(made.named_modules()), list[_Rounding]()
    for name, (weight_bits, activation_bits) in result.layers.items():
        layer = layers.get(name)
        if layer is None or not isinstance(getattr(layer, "weight", None), nn.Parameter):
            continue
        with torch.no_grad():
            levels = 2 ** (result.config.weight_bits_used(weight_bits) - 1) - 1
            together = not target.weights_per_channel or "Transpose" in type(layer).__name__
            layer.weight.copy_(_symmetric(layer.weight, levels, together, target))
        rounding = _Rounding(activation_bits, target)
        layer.register_forward_pre_hook(rounding)
        added.append(rounding)
    with torch.no_grad():
        for batch in batches:
            call_model(made, own_batch(batch))
    for rounding in added:
        rounding.rounds = True
    return made


class _Rounding:
    """A hook that remembers the range of what a layer reads, and later rounds it."""

    def __init__(self, bits: int, target: Target) -> None:
        self.bits, self.target, self.rounds = bits, target, False
        self.low, self.high = torch.zeros(()), torch.zeros(())

    def __call__(self, _: nn.Module, args: tuple[object, ...]) -> tuple[object, ...] | None:
        if not args or not isinstance(args[0], Tensor) or not args[0].numel():
            return None
        x = args[0]
        if not self.rounds:
            self.low, self.high = torch.minimum(self.low, x.min()), torch.maximum(self.high, x.max())
            return None
        if self.target.symmetric_activations:
            largest, levels = torch.maximum(-self.low, self.high), 2 ** (self.bits - 1) - 1
            step = _step(largest / levels, self.target)
            return ((x / step).round().clamp(-levels, levels) * step, *args[1:])
        levels = 2**self.bits - 1
        step = _step((self.high - self.low) / levels, self.target)
        zero = (-self.low / step).round()
        return (((x / step).round().add(zero).clamp(0, levels) - zero) * step, *args[1:])


def _step(step: Tensor, target: Target) -> Tensor:
    step = step.clamp_min(1e-30)
    return step.log2().ceil().exp2() if target.power_of_two_scales else step


def _symmetric(x: Tensor, levels: int, per_tensor: bool, target: Target) -> Tensor:
    largest = x.abs().max() if per_tensor else x.abs().flatten(1).amax(1).reshape(-1, *[1] * (x.dim() - 1))
    step = _step(largest / levels, target)
    return (x / step).round() * step


def wobbled(model: nn.Module, seed: int) -> nn.Module:
    """Return a network in which what each layer returns is disturbed as much as by another order of additions."""
    made = own_copy(model)
    generator = torch.Generator().manual_seed(seed)

    def hook(_: nn.Module, args: tuple[object, ...], output: object) -> object:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        return output * (1 + DISTURBED * torch.randn(output.shape, generator=generator, dtype=output.dtype))

    for module in made.modules():
        if not list(module.children()) or hasattr(module, "weight"):
            module.register_forward_hook(hook)
    return made
