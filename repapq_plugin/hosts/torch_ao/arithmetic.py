"""What torch's integer kernels compute, to the last bit, in a float graph.

A prepared graph sums float products, an integer kernel sums integers; where such a sum lies in the middle between two
codes of the output they may round apart, about once in a million values. Here sums are exact, and rounded in the very
steps that an engine takes. What those are says torch's source; the tests compare every engine's kernels with them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from repapq_plugin.core.quant_primitives import quantize
from repapq_plugin.evaluation.processor import has_vnni
from repapq_plugin.hosts.torch_ao._compat import RECTIFIED, GridModule, layer_of
from repapq_plugin.hosts.torch_ao.engines import INTEGER_BIAS, checked_engine, exact_engine
from repapq_plugin.hosts.torch_ao.fx import ENGINE
from repapq_plugin.hosts.torch_ao.grid import carry_grid, quantizer_at, weight_quantizer_of
from repapq_plugin.hosts.torch_ao.outputs import STORED_BOUNDS
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize
from repapq_plugin.quantizers.layers import QUANTIZABLE, apply_layer, output_channels_axis

ONEDNN_GROUPS = 100
"""Convolutions of up to so many groups go from ``x86`` to onednn where the processor has VNNI (torch's source; tests
there compare, none of ours ran on such a processor)."""

FLOAT32_INTEGERS = 2**24
"""Up to here float32 has every integer."""


def simulate_integers(prepared: GraphModule, backend: str | None = None) -> GraphModule:
    """Return a float graph that gives bit for bit what the network of `convert_to_int8` gives.

    It is several times slower than the prepared graph and needs no engine to run.

    Args:
        prepared: From `prepare_learned`, or from ``prepare_fx`` or ``prepare_qat_fx`` with our classes
            after calibration; not changed.
        backend: Engine to follow; default: the one it was prepared for, or `exact_engine`. Sums do not
            saturate here: where the engine's do (`saturates`), its network gives something else.

    Raises:
        ConfigError: torch has no such engine here.
    """
    engine = checked_engine(backend or prepared.meta.get(ENGINE) or exact_engine())
    simulated = carry_grid(prepared, engine)
    grids = {str(node.target): grid for node in simulated.graph.nodes if (grid := quantizer_at(simulated, node))}
    for node in simulated.graph.nodes:
        source = quantizer_at(simulated, node.args[0]) if node.op == "call_module" and node.args else None
        target = next(filter(None, (quantizer_at(simulated, user) for user in node.users)), None)
        if source is None or target is None:
            continue
        module = simulated.get_submodule(str(node.target))
        weight = weight_quantizer_of(module)
        if weight is not None and isinstance(layer_of(module), QUANTIZABLE):
            summed = IntegerSums(module, weight, source, target, engine)
            simulated.set_submodule(str(node.target), summed)
    for name, quantizer in grids.items():
        simulated.set_submodule(name, Stored(quantizer))
    return simulated.eval()


class Stored(nn.Module):
    """Stores a tensor as 8-bit integers, by the operator with which a converted graph does, and reads it again.

    Args:
        quantizer: Says scale, zero point and type.
    """

    def __init__(self, quantizer: GridModule) -> None:
        super().__init__()
        self.grid, self.dtype = _qparams(quantizer), quantizer.dtype

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, float32 of any shape, on the grid."""
        stored = torch.quantize_per_tensor(x, float(self.grid.scale), int(self.grid.zero_point), self.dtype)
        return stored.dequantize()


class IntegerSums(nn.Module):
    """A prepared layer with exact sums, rounded to the grid of its output as an engine does it.

    Maps float32 values on the input's grid to float32 values on the output's.

    Args:
        module: Convolution or linear layer of a prepared graph, perhaps fused with a ReLU; not changed.
        weight: Quantizer of its weight, signed and symmetric.
        source: Quantizer of its input.
        target: Quantizer of its output; taken for one of 8 bits, since integer layers know no other.
        engine: One of torch's engines.
    """

    def __init__(
        self, module: nn.Module, weight: LearnableFakeQuantize, source: GridModule, target: GridModule, engine: str
    ) -> None:
        super().__init__()
        layer = layer_of(module)
        bias = cast("Tensor | None", layer.bias)
        self.rectified = isinstance(module, RECTIFIED)
        self.rounding = _rounding(engine, layer)
        self.shape = (-1,) if isinstance(layer, nn.Linear) else (-1, 1, 1)
        codes = quantize(
            cast(Tensor, layer.weight).detach(),
            weight.scale,
            weight.zero_point,
            weight.quant_min,
            weight.quant_max,
            weight.ch_axis,
        )
        others = [axis for axis in range(codes.dim()) if axis != output_channels_axis(layer)]
        largest = STORED_BOUNDS[1] * int(codes.abs().sum(others).max())
        # Float32 where it holds every partial sum, in whatever order they are added.
        self.codes = codes.to(torch.float32 if largest <= FLOAT32_INTEGERS else torch.float64)
        self.layer = copy.copy(layer)
        self.layer._parameters = {"weight": None, "bias": None}
        self.source, self.target = _qparams(source), _qparams(target)
        # Products of floats in the engines' own order: another one rounds differently.
        self.step = (self.source.scale * weight.scale.detach().flatten()).reshape(self.shape)
        self.bias = torch.zeros(()) if bias is None else bias.detach().reshape(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Sum, rescale and round ``x``, float32 ``(N, C, H, W)``, or ``(..., features)`` for a linear layer."""
        codes = torch.round(x / self.source.scale).to(self.codes.dtype)
        sums = apply_layer(self.layer, codes, self.codes)
        low, high = STORED_BOUNDS
        if self.rectified:
            low = int(self.target.zero_point)
        rounded = self.rounding(sums, self.bias, self.step, self.target)
        return (rounded.clamp(low, high) - self.target.zero_point) * self.target.scale


class QParams(NamedTuple):
    """A grid's scale and zero point, float32 scalars."""

    scale: Tensor
    zero_point: Tensor


def _qparams(quantizer: GridModule) -> QParams:
    scale, zero_point = quantizer.calculate_qparams()
    return QParams(scale.detach().float().reshape(()), zero_point.float().reshape(()))


Rounding = Callable[[Tensor, Tensor, Tensor, QParams], Tensor]
"""Takes integer sums, biases, what one unit of the sums is worth, and the output's grid; returns codes, not clamped."""


def _qnnpack(sums: Tensor, bias: Tensor, step: Tensor, grid: QParams) -> Tensor:
    whole = sums + torch.round(bias / step).to(sums.dtype)
    return torch.round(whole.float() * (step * (1 / grid.scale))) + grid.zero_point


def _fbgemm(sums: Tensor, bias: Tensor, step: Tensor, grid: QParams) -> Tensor:
    return torch.round((sums.float() + bias / step) * (step / grid.scale)) + grid.zero_point


def _onednn(sums: Tensor, bias: Tensor, step: Tensor, grid: QParams) -> Tensor:
    return torch.round((sums.float() * step + bias) * (1 / grid.scale) + grid.zero_point)


def _rounding(engine: str, layer: nn.Module) -> Rounding:
    if engine in INTEGER_BIAS:
        return _qnnpack
    groups = None if isinstance(layer, nn.Linear) else cast(int, layer.groups)
    by_onednn = engine == "x86" and has_vnni() and groups is not None and groups <= ONEDNN_GROUPS
    return _onednn if engine == "onednn" or by_onednn else _fbgemm
