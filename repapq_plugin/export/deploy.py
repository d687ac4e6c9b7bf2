"""The form in which a runtime gets a quantized model: integer weights, 8-bit quantize/dequantize pairs.

A grid of ``b`` bits is *carried* inside 8-bit integers: weights keep their codes, activations are
clamped to the range of the b-bit grid and then rounded on the 8-bit grid of the same step and zero
point. The codes are those of the b-bit grid exactly, and every runtime has kernels for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode

from repapq_plugin.core.copies import own_copy
from repapq_plugin.core.modules import own_registries
from repapq_plugin.core.quant_primitives import CONTAINERS, grid_bounds
from repapq_plugin.core.tensors import change_first_tensor
from repapq_plugin.errors import ExportError
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize
from repapq_plugin.quantizers.layers import (
    OUTPUT,
    QuantizedLayer,
    RunsOwnForward,
    float_layer,
    output_channels_axis,
    take_role,
    weight_of,
)
from repapq_plugin.quantizers.outputs import remove_outputs
from repapq_plugin.quantizers.own_forward import is_plain
from repapq_plugin.quantizers.skips import SkippingModule, remove_skips

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
        # The tracer would take a conversion that changes nothing for a node.
        values = x if x.dtype == scale.dtype else x.to(scale.dtype)
        hat = torch.fake_quantize_per_tensor_affine(values, scale, zero_point.to(torch.int32), low, high)
        return hat if hat.dtype == x.dtype else hat.to(x.dtype)

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


class NumericSizes(TorchFunctionMode):
    """Lets a forward that is traced read sizes as numbers, except for that of the batch.

    Layers pad by the size of their input. The tracer would follow how, but gets it wrong: its integer division of
    negative numbers, with which sizes are rounded up, rounds the other way.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run a function, and look at what it returns if it reads a size."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is not torch.Tensor.size and getattr(func, "__self__", None) is not torch.Tensor.shape:
            return result
        if isinstance(result, tuple):
            return torch.Size([size if axis == 0 else int(size) for axis, size in enumerate(result)])
        axis = cast(int, kwargs.get("dim", args[-1]))
        return result if axis % cast(Tensor, args[0]).dim() == 0 else int(cast(Tensor, result))


def _carried(quantizer: LearnableFakeQuantize, where: str) -> tuple[Tensor, Tensor, tuple[float, float] | None]:
    """Return scale, zero point in its container, and the range to clamp to where the grid has fewer than 8 bits."""
    container = torch.uint8 if quantizer.quant_min >= 0 else torch.int8
    low, high = CONTAINERS[container]
    if quantizer.per_channel or quantizer.quant_min < low or quantizer.quant_max > high:
        raise ExportError(
            f"{where}: input grid [{quantizer.quant_min}, {quantizer.quant_max}], {quantizer.qscheme}, "
            "is not per tensor in 8 bits; quantize activations per tensor with 2 to 8 bits."
        )
    scale, zero_point = quantizer.scale.detach().reshape(()), quantizer.zero_point.reshape(())
    whole = (quantizer.quant_min, quantizer.quant_max) == (low, high)
    bounds = None if whole else grid_bounds(scale, zero_point, quantizer.quant_min, quantizer.quant_max)
    return scale.clone(), zero_point.to(container), bounds


def _rounded(x: Tensor, scale: Tensor, zero_point: Tensor, clamp_range: tuple[float, float] | None) -> Tensor:
    if clamp_range is not None:
        x = torch.clamp(x, *clamp_range)
    return cast(Tensor, QuantizeDequantize.apply(x, scale, zero_point))  # type: ignore[no-untyped-call]


class DeployedSkip(nn.Module):
    """The quantizer of what is added to a layer's output, or of an output, in export form."""

    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(self, quantizer: LearnableFakeQuantize, where: str) -> None:
        super().__init__()
        scale, zero_point, self.clamp_range = _carried(quantizer, where)
        self.register_buffer("input_scale", scale)
        self.register_buffer("input_zero_point", zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x``, float, any shape."""
        return _rounded(x, self.input_scale, self.input_zero_point, self.clamp_range)


class DeployedLayer(RunsOwnForward):
    """The role of a `QuantizedLayer` in export form: same output, but its weights are int8 codes.

    Either quantizer may be off: then the input stays as it comes, or the weight stays float.
    """

    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    input_scale: Tensor
    input_zero_point: Tensor
    quantizes_weight: bool
    quantizes_input: bool
    weight_dtype: torch.dtype
    weight_reads: int = 0
    """How often something else than the layer's own forward has read the weight."""
    clamp_range: tuple[float, float] | None

    @torch.no_grad()
    def _take_weight(self, quantizer: LearnableFakeQuantize, where: str) -> None:
        """Store the weight's codes, which are what the calibrated quantizer makes of it."""
        weight, axis = weight_of(self), output_channels_axis(self)
        low, high = CONTAINERS[torch.int8]
        if bool(quantizer.zero_point.any()) or quantizer.quant_min < low or quantizer.quant_max > high:
            raise ExportError(
                f"{where}: the weight grid [{quantizer.quant_min}, {quantizer.quant_max}] with zero points "
                f"{sorted(set(quantizer.zero_point.tolist()))} is not symmetric in 8 bits; quantize weights "
                "symmetrically with 2 to 8 bits."
            )
        if quantizer.per_channel and quantizer.ch_axis != axis:
            raise ExportError(
                f"{where}: weights are quantized along axis {quantizer.ch_axis}, but integer runtimes need a "
                f"scale per output channel, which is axis {axis}; use ch_axis={axis}."
            )
        scale = quantizer.scale.detach()
        if scale.numel() != (weight.shape[axis] if quantizer.per_channel else 1):
            raise ExportError(
                f"{where}: its weight quantizer has {scale.numel()} scales for {weight.shape[axis]} "
                "output channels; calibrate the layer before the export."
            )
        shape = [1] * weight.dim()
        if quantizer.per_channel:
            shape[axis] = -1
        else:
            scale = scale.reshape(())
        codes = torch.round(quantizer.quantize_dequantize(weight) / scale.reshape(shape))
        self.register_buffer("weight_codes", codes.to(torch.int8))
        self.register_buffer("weight_scale", scale.clone())
        self.register_buffer("weight_zero_point", torch.zeros_like(scale, dtype=torch.int8))
        self.weight_dtype = weight.dtype
        del self._parameters["weight"]

    @torch.no_grad()
    def _take_input(self, quantizer: LearnableFakeQuantize, where: str) -> None:
        """Store scale and zero point, and the range to clamp to where the grid has fewer than 8 bits."""
        scale, zero_point, self.clamp_range = _carried(quantizer, where)
        self.register_buffer("input_scale", scale)
        self.register_buffer("input_zero_point", zero_point)

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Run the layer on the quantized input with dequantized integer weights."""
        if self.quantizes_input:
            args, kwargs = change_first_tensor(args, kwargs, self._quantized)
        weight = self.multiplying(self.dequantized_weight()) if self.quantizes_weight else nullcontext()
        with weight, NumericSizes() if torch.onnx.is_in_onnx_export() and not is_plain(self) else nullcontext():
            output = self.float_forward(*args, **kwargs)
        rounding = self._modules.get(OUTPUT)
        return output if rounding is None else cast(Tensor, rounding(output))

    def _quantized(self, x: Tensor) -> Tensor:
        return _rounded(x, self.input_scale, self.input_zero_point, self.clamp_range)

    def dequantized_weight(self) -> Tensor:
        """Return the float weight that the integer codes stand for."""
        axis = output_channels_axis(self)
        codes = (self.weight_codes, self.weight_scale, self.weight_zero_point)
        weight = cast(Tensor, DequantizeWeight.apply(*codes, axis))  # type: ignore[no-untyped-call]
        return weight if weight.dtype == self.weight_dtype else weight.to(self.weight_dtype)

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        if name == "weight" and "weight_codes" in self._buffers:
            self.weight_reads += 1
            return self.dequantized_weight()
        return super().__getattr__(name)


def deploy_layer(quantized: QuantizedLayer, where: str) -> DeployedLayer:
    """Bring a calibrated layer into export form, in place.

    Args:
        quantized: The layer.
        where: Module path, for error messages.

    Raises:
        ExportError: The layer is not ready (affine not folded, still observing), or its grid does
            not fit 8-bit integers.
    """
    _refuse_unfinished(quantized, where)
    of_weight, of_input = quantized.weight_fake_quant, quantized.input_fake_quant
    of_output = quantized._modules.get(OUTPUT)
    deployed = take_role(float_layer(quantized), DeployedLayer)
    if of_output is not None:
        deployed.register_module(OUTPUT, of_output)
    deployed.quantizes_weight, deployed.quantizes_input = of_weight.quantizing, of_input.quantizing
    deployed.clamp_range = None
    if deployed.quantizes_weight:
        deployed._take_weight(of_weight, where)
    if deployed.quantizes_input:
        deployed._take_input(of_input, where)
    return deployed


def _refuse_unfinished(quantized: QuantizedLayer, where: str) -> None:
    if quantized.affine is not None:
        raise ExportError(
            f"{where}: its affine is not folded yet, and a runtime would need an operator for it; fold it "
            "before the export, as the end of a calibration does."
        )
    for name in ("input_fake_quant", "weight_fake_quant"):
        _refuse_observing(getattr(quantized, name), f"{where}.{name}")


def _refuse_observing(quantizer: LearnableFakeQuantize, where: str) -> None:
    if quantizer.quantizing and quantizer.observing:
        raise ExportError(
            f"{where} still observes, so its range moves with every batch; finish the "
            "calibration, or call enable_observer(False) on it, before the export."
        )


def _deploy_skips(model: nn.Module) -> None:
    """Bring quantizers of summands into export form, in place."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, SkippingModule):
            continue
        deployed: list[nn.Module] = []
        for giver, quantizer in zip(module.skip_givers, module.skip_fake_quants, strict=True):
            where = f"What is added to the output of {'.'.join(part for part in (name, giver) if part)!r}"
            _refuse_observing(cast(LearnableFakeQuantize, quantizer), where)
            of_skip = cast(LearnableFakeQuantize, quantizer)
            deployed.append(DeployedSkip(of_skip, where) if of_skip.quantizing else nn.Identity())
        module.skip_fake_quants = nn.ModuleList(deployed)


def _deploy_outputs(model: nn.Module) -> None:
    """Bring quantizers of outputs into export form, in place."""
    for name, module in list(model.named_modules()):
        quantizer = dict(module.named_children()).get(OUTPUT)
        if isinstance(quantizer, LearnableFakeQuantize):
            where = f"The output of {name or 'the network'!r}"
            _refuse_observing(quantizer, where)
            own_registries(module)  # a copy of a layer shares them
            module._modules[OUTPUT] = DeployedSkip(quantizer, where) if quantizer.quantizing else nn.Identity()


def deployable(model: nn.Module) -> nn.Module:
    """Return a deep copy in which every `QuantizedLayer` has its export form.

    The copy is in evaluation mode and computes what ``model`` computes, in float32 what that computes in half
    precision. Layers both of whose quantizers are off come back as the plain float layers that they are.

    Raises:
        ExportError: A layer's affine is not folded, a quantizer still observes, or a grid does not
            fit 8-bit integers; the message names the layer.
        HostError: The model cannot be copied.
    """
    model = own_copy(model).eval()
    _deploy_skips(model)
    _deploy_outputs(model)
    for where, layer in _quantized_layers(model):
        if layer.input_fake_quant.quantizing or layer.weight_fake_quant.quantizing:
            deploy_layer(layer, where).eval()
        else:
            float_layer(layer)
    return model


def without_quantizers(model: nn.Module) -> nn.Module:
    """Return a deep copy in evaluation mode in which every `QuantizedLayer` is a float layer again.

    Raises:
        HostError: The model cannot be copied.
    """
    model = own_copy(model).eval()
    remove_outputs(model)
    remove_skips(model)
    for _, layer in _quantized_layers(model):
        float_layer(layer)
    return model


def _quantized_layers(model: nn.Module) -> list[tuple[str, QuantizedLayer]]:
    """Return the layers to change by path; a layer and its ``copy.copy`` can be changed one by one afterwards."""
    named = [(name or "model", m) for name, m in model.named_modules() if isinstance(m, QuantizedLayer)]
    return [(name, own_registries(layer)) for name, layer in named]
