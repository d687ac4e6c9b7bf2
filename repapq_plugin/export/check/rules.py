"""One check for each rule that a target can have; which of them it has, `repapq_plugin.targets` says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from repapq_plugin.export.check.graph import MOVING, OUTSIDE, Grid, Layer, QuantizedGraph
from repapq_plugin.targets import Target

if TYPE_CHECKING:
    import onnx

Broken = tuple["onnx.NodeProto | None", str]
"""The node that breaks a rule (none: the whole file), and how, in half a sentence."""

Check = Callable[[QuantizedGraph, Target], Iterator[Broken]]

CHECKS: dict[str, Check] = {}
"""The check of each rule by its key."""

REMEDIES: dict[str, str] = {}
"""What to do about a broken rule, by its key."""

BIAS_TOLERANCE = 1e-4
"""How far, relative to it, the scale of a bias may be from the product of the two others."""


def check(key: str, remedy: str) -> Callable[[Check], Check]:
    """Let a function be the check of a rule."""

    def add(function: Check) -> Check:
        CHECKS[key], REMEDIES[key] = function, remedy
        return function

    return add


def _activations(graph: QuantizedGraph) -> Iterator[tuple[onnx.NodeProto, Grid]]:
    for node in graph.activation_quantizers:
        yield node, graph.grid(node)


def _weights(graph: QuantizedGraph) -> Iterator[tuple[Layer, Grid]]:
    for layer in graph.layers:
        if layer.weight is not None:
            yield layer, layer.weight


@check("opset", "Export with an operator set that the target reads (`export_onnx(..., opset=...)`).")
def _opset(graph: QuantizedGraph, target: Target) -> Iterator[Broken]:
    if not target.min_opset <= graph.opset <= target.max_opset:
        yield None, f"operator set {graph.opset}, not {target.min_opset} to {target.max_opset}"


@check("format", "Quantize in QDQ form: QuantFormat.QDQ in onnxruntime, pairs of QuantizeLinear and DequantizeLinear.")
def _format(graph: QuantizedGraph, target: Target) -> Iterator[Broken]:
    for node in graph.nodes:
        pair_elsewhere = node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.domain not in ("", "ai.onnx")
        if node.op_type.startswith(OUTSIDE) or pair_elsewhere:
            yield node, f"{node.op_type} of {node.domain or 'the standard'} is no pair around a float operator"


@check("activation_type", "Quantize activations to the target's integer type; here, `RepAPQConfig(target=...)`.")
def _activation_type(graph: QuantizedGraph, target: Target) -> Iterator[Broken]:
    for node, grid in _activations(graph):
        if grid.dtype not in target.activation_types:
            yield node, f"activations are {grid.dtype}, not {' or '.join(target.activation_types)}"


@check("activation_zero_point", "Quantize activations symmetrically (ActivationSymmetric in onnxruntime).")
def _activation_zero_point(graph: QuantizedGraph, target: Target) -> Iterator[Broken]:
    for node, grid in _activations(graph):
        if grid.zero_point is None or grid.zero_point.any():
            yield node, f"the zero point of an activation is not 0 ({grid})"


@check("activation_granularity", "Give each activation one scale.")
def _activation_granularity(graph: QuantizedGraph, target: Target) -> Iterator[Broken]:
    for node, grid in _activations(graph):
        if grid.scale is not None and grid.scale.size > 1:
            yield node, f"an activation has {grid.scale.size} scales"


@check("weight_type", "Store weights in the target's integer type.")
def _weight_type(graph: QuantizedGraph, target: Target) -> Iterator[Broken]:
    for layer, grid in _weights(graph):
        if grid.dtype not in target.weight_types:
            yield layer.node, f"weights are {grid.dtype}, not {' or '.join(target.weight_types)}"


@check("weight_zero_point", "Quantize weights symmetrically (WeightSymmetric in onnxruntime).")
def _weight_zero_point(graph: QuantizedGraph, target: Target) -> Iterator[Broken]:
    for layer, grid in _weights(graph):
        if grid.zero_point is None or grid.zero_point.any():
            yield layer.node, f"the zero point of the weight is not 0 ({grid})"


@check("weight_range", "Quantize weights to plus and minus 127 (narrow range).")
def _weight_range(graph: QuantizedGraph, target: Target) -> Iterator[Broken]:
    for layer, grid in _weights(graph):
        if grid.dtype == "int8" and layer.codes is not None and layer.codes.dtype == np.int8:
            count = int((layer.codes == -128).sum())
            if count:
                yield layer.node, f"{count} codes of the weight are -128"


@check("weight_axis", "Give each output channel a scale: axis 0 of a convolution, 1 of a transposed one.")
def _weight_axis(graph: QuantizedGraph, target: Target) -> Iterator[Broken]:
    for layer, grid in _weights(graph):
        if grid.scale is None or grid.scale.size == 1 or layer.codes is None:
            continue
        axis, wanted = grid.axis % layer.codes.ndim, graph.output_axis(layer)
        if axis != wanted:
            yield layer.node, f"scales of the weight lie along axis {axis}, its output channels along {wanted}"
        elif grid.scale.size != layer.codes.shape[axis]:
            yield layer.node, f"{grid.scale.size} scales for {layer.codes.shape[axis]} output channels"


@check("weight_granularity", "Give each weight one scale: `weights_per_channel=False` of the target.")
def _weight_granularity(graph: QuantizedGraph, target: Target) -> Iterator[Broken]:
    for layer, grid in _weights(graph):
        if grid.scale is not None and grid.scale.size > 1:
            yield layer.node, f"the weight has {grid.scale.size} scales"


@check("power_of_two", "Quantize with scales that are powers of two: `power_of_two_scales=True` of the target.")
def _power_of_two(graph: QuantizedGraph, target: Target) -> Iterator[Broken]:
    for node in graph.of_operator("QuantizeLinear", "DequantizeLinear"):
        scale = graph.grid(node).scale
        if scale is not None and not bool((np.frexp(scale)[0] == 0.5).all()):
            yield node, f"a scale is no power of two ({graph.grid(node)})"


@check("scale", "Store scales as finite positive numbers; calibrate with data that are neither constant nor NaN.")
def _scale(graph: QuantizedGraph, target: Target) -> Iterator[Broken]:
    for node in graph.of_operator("QuantizeLinear", "DequantizeLinear"):
        grid = graph.grid(node)
        if grid.scale is None or grid.zero_point is None:
            yield node, "its scale or zero point is computed, not stored"
        elif not bool((np.isfinite(grid.scale) & (grid.scale > 0)).all()):
            yield node, f"a scale is not a finite positive number ({grid})"


@check("pairs", "Let every DequantizeLinear have scale and zero point of the QuantizeLinear before it.")
def _pairs(graph: QuantizedGraph, target: Target) -> Iterator[Broken]:
    for node in graph.of_operator("DequantizeLinear"):
        for quantizer in graph.quantizers_behind(node):
            before, after = graph.grid(quantizer), graph.grid(node)
            if not before.equals(after) and before.scale is not None:
                yield node, f"it reads codes of another grid ({before}) as its own ({after})"
                break
    for node in graph.of_operator("QuantizeLinear"):
        for reader in graph.readers.get(node.output[0], []):
            if reader.op_type != "DequantizeLinear" and reader.op_type not in MOVING:
                yield node, f"{reader.op_type} {reader.name!r} reads its codes"
                break


@check("layer_input", "Put a pair in front of the layer, or keep its weight float.")
def _layer_input(graph: QuantizedGraph, target: Target) -> Iterator[Broken]:
    for layer in graph.layers:
        if layer.is_integer and layer.source is None:
            yield layer.node, "its weight is in integers, and it reads floats"


@check("layer_weight", "Quantize the weight too, or let the layer read the float tensor.")
def _layer_weight(graph: QuantizedGraph, target: Target) -> Iterator[Broken]:
    for layer in graph.layers:
        if not layer.is_integer and layer.source is not None:
            yield layer.node, "it reads integers, and its weight is float"


@check("bias", "Keep the bias float, or int32 at the product of both scales where the target takes that.")
def _bias(graph: QuantizedGraph, target: Target) -> Iterator[Broken]:
    for layer, grid in _weights(graph):
        name = layer.node.input[2] if len(layer.node.input) > 2 else ""
        maker = graph.made.get(name)
        if not name:
            continue
        if maker is None or maker.op_type != "DequantizeLinear":
            if target.bias == "int32":
                yield layer.node, "its bias is float, not int32"
            continue
        bias = graph.grid(maker)
        if target.bias == "float":
            yield layer.node, f"its bias is quantized ({bias}), not float"
        elif bias.dtype != "int32":
            yield layer.node, f"its bias is {bias.dtype}, not int32"
        elif bias.zero_point is None or bias.zero_point.any():
            yield layer.node, "the zero point of its bias is not 0"
        elif layer.source is not None and not _is_product(bias, grid, graph.grid(layer.source)):
            yield layer.node, f"the scale of its bias is not the product of both scales ({bias})"


def _is_product(bias: Grid, weight: Grid, activation: Grid) -> bool:
    if bias.scale is None or weight.scale is None or activation.scale is None or activation.scale.size > 1:
        return False
    product = weight.scale.ravel() * float(activation.scale.ravel()[0])
    return bias.scale.size in (1, product.size) and bool(
        (np.abs(bias.scale.ravel() / product - 1) <= BIAS_TOLERANCE).all()
    )


@check("residual", "Quantize the skipping input of the addition (`RepAPQConfig(target=...)` does).")
def _residual(graph: QuantizedGraph, target: Target) -> Iterator[Broken]:
    layers = {layer.node.output[0] for layer in graph.layers if layer.is_integer and layer.source is not None}
    for node in graph.of_operator("Add"):
        if any(graph.is_constant(name) for name in node.input):
            continue
        quantized = [graph.dequantized(name) is not None for name in node.input]
        if any(name in layers for name in node.input) and not any(quantized):
            yield node, "neither of its inputs is quantized, and one comes from a layer in integers"


@check("shared_grid", "Give all inputs one scale and zero point: quantize once, behind the operator.")
def _shared_grid(graph: QuantizedGraph, target: Target) -> Iterator[Broken]:
    for node in graph.of_operator(*target.shared_grid_operators):
        sources = [graph.dequantized(name) for name in node.input]
        grids = [graph.grid(source) for source in sources if source is not None]
        if any(not grid.equals(grids[0]) for grid in grids[1:]):
            yield node, f"its inputs have different grids ({'; '.join(map(str, grids[:3]))})"


@check("float_operator", "Leave the operator out of quantization.")
def _float_operator(graph: QuantizedGraph, target: Target) -> Iterator[Broken]:
    for node in graph.of_operator(*target.float_operators):
        readers = graph.readers.get(node.output[0], [])
        if graph.dequantized(node.input[0]) is not None and any(each.op_type == "QuantizeLinear" for each in readers):
            yield node, f"{node.op_type} has a pair before and behind it"
