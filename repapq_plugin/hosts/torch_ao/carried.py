"""Which layers torch.ao's integer modules can carry, and what stands for a layer there; all others stay simulated.

An integer module knows one tensor, numbers of padding and torch's own forward. Other paddings are done in front of it,
which gives the same: what they add is on the grid of what they are given. A layer with a forward of its own, with hooks
or with further arguments runs as it was calibrated, in float, with its own quantizers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from repapq_plugin.core.modules import has_hooks, without_hooks
from repapq_plugin.core.tensors import first_tensor
from repapq_plugin.hosts.torch_ao.engines import NO_OUTPUT_PADDING, has_kernel
from repapq_plugin.quantizers.layers import QUANTIZABLE, QuantizedLayer, bias_of, float_layer, weight_of
from repapq_plugin.quantizers.own_forward import Arguments, is_plain

PADDED_INSIDE = {nn.Conv1d: ("zeros", "reflect"), nn.Conv2d: ("zeros", "reflect"), nn.Conv3d: ("zeros",)}
"""Modes of padding that torch's integer convolutions have themselves."""


def reason_to_simulate(layer: QuantizedLayer, calls: Sequence[Arguments], engine: str) -> str:
    """Return why no integer module can stand for a layer, or an empty text.

    Args:
        layer: A calibrated layer.
        calls: What it is called with.
        engine: One of torch's engines.
    """
    if not has_kernel(layer, engine):
        return f"{engine} has no kernel for it"
    if layer.is_baked or not is_plain(layer):
        return "it has a forward of its own"
    if has_hooks(layer):
        return "it has hooks of its own"
    if not calls:
        return "it is not called by itself"
    if isinstance(layer, nn.ConvTranspose2d) and engine in NO_OUTPUT_PADDING and any(layer.output_padding):
        return f"{engine} has no output_padding"
    given = [first_tensor(args, kwargs) for args, kwargs in calls]
    if any(len(args) + len(kwargs) > 1 for args, kwargs in calls):
        return "it is called with more than a tensor"
    axes = 2 if isinstance(layer, nn.Linear) else weight_of(layer).dim()
    if any(x is None or x.dim() < axes for x in given):
        return "it is called without a batch"
    return ""


def plain_layer_of(layer: QuantizedLayer) -> tuple[nn.Module, Padding | None]:
    """Return torch's own layer for a calibrated one, and what pads in front of it where it cannot do so itself.

    Args:
        layer: One without a `reason_to_simulate`; not changed. Its weight is shared.
    """
    plain = float_layer(without_hooks(layer))
    plain.__class__ = next(kind for kind in type(plain).__mro__ if kind in QUANTIZABLE)
    bias = bias_of(plain)
    if bias is not None:  # an engine may round it, for each call anew
        plain.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    if not isinstance(plain, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return plain, None
    amounts = _amounts(plain)
    inside = plain.padding_mode in PADDED_INSIDE[type(plain)] and all(before == after for before, after in amounts)
    padding = None if inside else Padding(amounts, plain.padding_mode)
    numbers = tuple(before if inside else 0 for before, _ in amounts)
    plain.padding = numbers
    if not inside:
        plain.padding_mode = "zeros"
    return plain, padding


def _amounts(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[tuple[int, int]]:
    """Return how much is padded before and behind each axis."""
    if not isinstance(layer.padding, str):
        return [(amount, amount) for amount in layer.padding]
    if layer.padding == "valid":
        return [(0, 0) for _ in layer.kernel_size]
    totals = [step * (size - 1) for step, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


class Padding(nn.Module):
    """Pads a tensor as a convolution would, float or quantized; what is added is on the grid of the tensor.

    Args:
        amounts: What is added before and behind each axis, outermost axis first.
        mode: ``padding_mode`` of a convolution.
    """

    def __init__(self, amounts: Sequence[tuple[int, int]], mode: str) -> None:
        super().__init__()
        self.amounts = [amount for pair in reversed(amounts) for amount in pair]
        self.mode = "constant" if mode == "zeros" else mode

    def forward(self, x: Tensor) -> Tensor:
        """Pad ``x``, ``(N, C, *positions)``."""
        if not x.is_quantized:
            return functional.pad(x, self.amounts, self.mode)
        padded = functional.pad(x.dequantize(), self.amounts, self.mode)
        return torch.quantize_per_tensor(padded, x.q_scale(), x.q_zero_point(), x.dtype)

    def extra_repr(self) -> str:
        """Say how much is padded, and with what."""
        return f"{self.amounts}, {self.mode}"


def simulated_layers(prepared: nn.Module) -> dict[str, nn.Module]:
    """Return copies of the calibrated layers that a prepared network runs as they are, by module path.

    A conversion takes the observers out of every module, and `put_back` brings them again.
    """
    return {name: copy.deepcopy(m) for name, m in prepared.named_modules() if isinstance(m, QuantizedLayer)}


def put_back(converted: nn.Module, simulated: Mapping[str, nn.Module]) -> None:
    """Put what `simulated_layers` returned into the converted network."""
    for name, layer in simulated.items():
        converted.set_submodule(name, layer)
