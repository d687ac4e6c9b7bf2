"""The form in which a runtime gets a quantized model: integer weights, 8-bit quantize/dequantize pairs.

A grid of ``b`` bits is *carried* inside 8-bit integers: weights keep their codes, activations are
clamped to the range of the b-bit grid and then rounded on the 8-bit grid of the same step and zero
point. The codes are those of the b-bit grid exactly, and every runtime has kernels for them.
"""

from __future__ import annotations

import copy
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from repapq_plugin.core.modules import replace_modules
from repapq_plugin.core.quant_primitives import CONTAINERS, grid_bounds
from repapq_plugin.errors import ExportError
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize
from repapq_plugin.quantizers.layers import QuantizedLayer, apply_layer, output_channels_axis

__all__ = ["CONTAINERS", "DeployedLayer", "deployable", "without_quantizers"]


class _OnnxGraph(Protocol):
    """What torch's tracing exporter hands to ``symbolic``: the graph under construction."""

    def op(self, operator: str, *inputs: torch.Value, **attributes: int) -> torch.Value:
        """Append a node and return its output; an attribute's name ends in its type (``axis_i``)."""


class QuantizeDequantize(torch.autograd.Function):
    """``DequantizeLinear(QuantizeLinear(x))`` per tensor, as one pair of ONNX nodes."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Round ``x`` (float, any shape) to the container's grid; ``zero_point`` is uint8 or int8, scalar."""
        low, high = CONTAINERS[zero_point.dtype]
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point.to(torch.int32), low, high)

    @staticmethod
    def symbolic(g: _OnnxGraph, x: torch.Value, scale: torch.Value, zero_point: torch.Value) -> torch.Value:
        """Emit the pair."""
        codes = g.op("QuantizeLinear", x, scale, zero_point)
        return g.op("DequantizeLinear", codes, scale, zero_point).setType(x.type())


class DequantizeWeight(torch.autograd.Function):
    """``DequantizeLinear`` of integer weights, so that a file holds no float copy of them."""

    @staticmethod
    def forward(ctx: FunctionCtx, codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
        """Return float weights: ``codes`` int8; ``scale`` float, scalar or along ``axis``."""
        shape = [1] * codes.dim()
        if scale.dim():
            shape[axis] = -1
        return codes.to(scale.dtype) * scale.reshape(shape)

    @staticmethod
    def symbolic(
        g: _OnnxGraph, codes: torch.Value, scale: torch.Value, zero_point: torch.Value, axis: int
    ) -> torch.Value:
        """Emit the node."""
        weight = g.op("DequantizeLinear", codes, scale, zero_point, axis_i=axis)
        return weight.setType(codes.type().with_dtype(torch.float32))


class DeployedLayer(nn.Module):
    """A `QuantizedLayer` in export form: same output, but its weights are int8 codes.

    Either quantizer may be off: then the input stays as it comes, or the weight stays float.

    Args:
        quantized: The calibrated layer; its float layer's bias is adopted, its weight is not.
        where: Module path, for error messages.

    Raises:
        ExportError: The layer is not ready (affine not folded, still observing), or its grid does
            not fit 8-bit integers.
    """

    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(self, quantized: QuantizedLayer, where: str) -> None:
        super().__init__()
        _refuse_unfinished(quantized, where)
        self.layer = _copy_of_layer(quantized.layer)
        self.axis = output_channels_axis(quantized.layer)
        self.quantizes_weight = quantized.weight_fake_quant.quantizing
        self.quantizes_input = quantized.input_fake_quant.quantizing
        self.clamp_range: tuple[float, float] | None = None
        if self.quantizes_weight:
            self._take_weight(quantized, where)
        if self.quantizes_input:
            self._take_input(quantized.input_fake_quant, where)

    @torch.no_grad()
    def _take_weight(self, quantized: QuantizedLayer, where: str) -> None:
        """Store the weight's codes, which are what the calibrated quantizer makes of it."""
        quantizer, weight = quantized.weight_fake_quant, quantized.weight
        low, high = CONTAINERS[torch.int8]
        if bool(quantizer.zero_point.any()) or quantizer.quant_min < low or quantizer.quant_max > high:
            raise ExportError(
                f"{where}: the weight grid [{quantizer.quant_min}, {quantizer.quant_max}] with zero points "
                f"{sorted(set(quantizer.zero_point.tolist()))} is not symmetric in 8 bits; quantize weights "
                "symmetrically with 2 to 8 bits."
            )
        if quantizer.per_channel and quantizer.ch_axis != self.axis:
            raise ExportError(
                f"{where}: weights are quantized along axis {quantizer.ch_axis}, but integer runtimes need a "
                f"scale per output channel, which is axis {self.axis}; use ch_axis={self.axis}."
            )
        scale = quantizer.scale.detach()
        if scale.numel() != (weight.shape[self.axis] if quantizer.per_channel else 1):
            raise ExportError(
                f"{where}: its weight quantizer has {scale.numel()} scales for {weight.shape[self.axis]} "
                "output channels; calibrate the layer before the export."
            )
        shape = [1] * weight.dim()
        if quantizer.per_channel:
            shape[self.axis] = -1
        else:
            scale = scale.reshape(())
        codes = torch.round(quantizer.quantize_dequantize(weight) / scale.reshape(shape))
        self.register_buffer("weight_codes", codes.to(torch.int8))
        self.register_buffer("weight_scale", scale.clone())
        self.register_buffer("weight_zero_point", torch.zeros_like(scale, dtype=torch.int8))
        self.layer.register_parameter("weight", None)

    @torch.no_grad()
    def _take_input(self, quantizer: LearnableFakeQuantize, where: str) -> None:
        """Store scale and zero point, and the range to clamp to where the grid has fewer than 8 bits."""
        container = torch.uint8 if quantizer.quant_min >= 0 else torch.int8
        low, high = CONTAINERS[container]
        if quantizer.per_channel or quantizer.quant_min < low or quantizer.quant_max > high:
            raise ExportError(
                f"{where}: input grid [{quantizer.quant_min}, {quantizer.quant_max}], {quantizer.qscheme}, "
                "is not per tensor in 8 bits; quantize activations per tensor with 2 to 8 bits."
            )
        scale, zero_point = quantizer.scale.detach().reshape(()), quantizer.zero_point.reshape(())
        self.register_buffer("input_scale", scale.clone())
        self.register_buffer("input_zero_point", zero_point.to(container))
        if (quantizer.quant_min, quantizer.quant_max) != (low, high):
            self.clamp_range = grid_bounds(scale, zero_point, quantizer.quant_min, quantizer.quant_max)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Run the layer on the quantized input with dequantized integer weights."""
        if self.quantizes_input:
            if self.clamp_range is not None:
                x = torch.clamp(x, *self.clamp_range)
            x = cast(Tensor, QuantizeDequantize.apply(x, self.input_scale, self.input_zero_point))  # type: ignore[no-untyped-call]
        return apply_layer(self.layer, x, self.weight(), output_size)

    def weight(self) -> Tensor:
        """Return the float weight that the integer codes stand for."""
        if not self.quantizes_weight:
            return cast(Tensor, self.layer.weight)
        return cast(
            Tensor,
            DequantizeWeight.apply(self.weight_codes, self.weight_scale, self.weight_zero_point, self.axis),  # type: ignore[no-untyped-call]
        )


def _copy_of_layer(layer: nn.Module) -> nn.Module:
    """Copy a layer, so that dropping its float weight leaves other holders of the layer alone."""
    twin = copy.copy(layer)
    twin._parameters = dict(layer._parameters)
    return twin


def _refuse_unfinished(quantized: QuantizedLayer, where: str) -> None:
    if quantized.affine is not None:
        raise ExportError(
            f"{where}: its affine is not folded yet, and a runtime would need an operator for it; fold it "
            "before the export, as the end of a calibration does."
        )
    for name in ("input_fake_quant", "weight_fake_quant"):
        quantizer = getattr(quantized, name)
        if quantizer.quantizing and quantizer.observing:
            raise ExportError(
                f"{where}.{name} still observes, so its range moves with every batch; finish the "
                "calibration, or call enable_observer(False) on it, before the export."
            )


def _export_form(quantized: QuantizedLayer, where: str) -> nn.Module:
    if quantized.input_fake_quant.quantizing or quantized.weight_fake_quant.quantizing:
        return DeployedLayer(quantized, where).eval()
    return quantized.layer


def deployable(model: nn.Module) -> nn.Module:
    """Return a deep copy in which every `QuantizedLayer` has its export form.

    The copy is in evaluation mode and computes what ``model`` computes. Layers both of whose
    quantizers are off come back as the plain float layers that they wrap.

    Raises:
        ExportError: A layer's affine is not folded, a quantizer still observes, or a grid does not
            fit 8-bit integers; the message names the layer.
    """
    model = copy.deepcopy(model).eval()
    layers = {m: name or "model" for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}
    return replace_modules(model, {layer: _export_form(layer, where) for layer, where in layers.items()})


def without_quantizers(model: nn.Module) -> nn.Module:
    """Return a deep copy in evaluation mode in which every `QuantizedLayer` is its float layer again."""
    model = copy.deepcopy(model).eval()
    return replace_modules(model, {m: m.layer for m in model.modules() if isinstance(m, QuantizedLayer)})
