"""Padding in an ONNX graph, in the form in which runtimes find integer convolutions behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from repapq_plugin.core.onnx_weights import GraphNamer, integer_layers, values_read

if TYPE_CHECKING:
    import onnx

MOVING_OPERATORS = ("Pad", "Slice", "Concat")
"""Operators that put values elsewhere and leave them as they are: with them layers pad their input."""


def _attribute(node: onnx.NodeProto, name: str, default: object) -> object:
    import onnx.helper

    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def spell_out_padding(graph: onnx.GraphProto) -> None:
    """Say in numbers what ``auto_pad`` means: onnxruntime knows it only without dilation."""
    from onnx import helper

    for node in graph.node:
        auto = _attribute(node, "auto_pad", b"NOTSET")
        kernel = cast("list[int]", _attribute(node, "kernel_shape", []))
        if node.op_type != "Conv" or auto == b"NOTSET" or not kernel:
            continue
        ones = [1] * len(kernel)
        total = [0] * len(kernel)
        if auto != b"VALID":
            if _attribute(node, "strides", ones) != ones:  # depends on the input's size; torch knows no such layer
                continue
            dilations = cast("list[int]", _attribute(node, "dilations", ones))
            total = [dilation * (size - 1) for dilation, size in zip(dilations, kernel, strict=True)]
        smaller, larger = [n // 2 for n in total], [n - n // 2 for n in total]
        pads = larger + smaller if auto == b"SAME_LOWER" else smaller + larger
        kept = [a for a in node.attribute if a.name not in ("auto_pad", "pads")]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("pads", pads)])


def move_codes(graph: onnx.GraphProto) -> None:
    """Let a layer that pads its quantized input pad the codes: it then reads integers, which runtimes look for.

    Zeros are the code of the zero point. Nothing changes for a padding with other values, and where something else
    reads the padded tensor.
    """
    import onnx

    namer = GraphNamer(graph)
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    for layer in integer_layers(graph):
        moving: dict[str, onnx.NodeProto] = {}
        source = _moved_from(layer.input[0], made, moving)
        if source is None or not moving or not _reads_alone(graph, layer, moving):
            continue
        zeros = [node for node in moving.values() if _pads_constantly(node)]
        if not all(_pads_zeros(node, initializers) for node in zeros):
            continue
        for node in (node for node in moving.values() if node.op_type == "Pad"):
            value = source.input[2] if node in zeros else ""
            node.input[:] = [*node.input[:2], value, *node.input[3:]]
        for node in moving.values():
            node.input[:] = [source.input[0] if name == source.output[0] else name for name in node.input]
        pair = onnx.NodeProto()
        pair.CopyFrom(source)
        pair.name = namer.fresh(f"{layer.name}/DequantizeLinear")
        pair.input[0], pair.output[0] = layer.input[0], namer.fresh(f"{layer.input[0]}.dequantized")
        layer.input[0] = pair.output[0]
        graph.node.insert(list(graph.node).index(layer), pair)


def _moved_from(
    name: str, made: Mapping[str, onnx.NodeProto], moving: dict[str, onnx.NodeProto]
) -> onnx.NodeProto | None:
    """Return the DequantizeLinear all of whose values, and no others, a value holds; note what moved them there."""
    node = made.get(name)
    if node is None:
        return None
    if node.op_type == "DequantizeLinear":
        return node if node.input[0] in made else None  # of codes that are computed, not of a weight
    if node.op_type not in MOVING_OPERATORS:
        return None
    moving[name] = node
    data = node.input if node.op_type == "Concat" else node.input[:1]
    sources = [_moved_from(value, made, moving) for value in data]
    first = sources[0]
    if first is None or any(source is None or source.output[0] != first.output[0] for source in sources):
        return None
    return first


def _reads_alone(graph: onnx.GraphProto, layer: onnx.NodeProto, moving: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether nothing but ``layer`` reads, through others of them, what some nodes made."""
    allowed = {layer.output[0], *moving}
    if any(value.name in moving for value in graph.output):
        return False
    return all(node.output[0] in allowed for node in graph.node if any(name in moving for name in values_read(node)))


def _pads_constantly(node: onnx.NodeProto) -> bool:
    return node.op_type == "Pad" and _attribute(node, "mode", b"constant") == b"constant"


def _pads_zeros(node: onnx.NodeProto, initializers: Mapping[str, onnx.TensorProto]) -> bool:
    from onnx import numpy_helper

    if len(node.input) < 3 or not node.input[2]:
        return True
    value = initializers.get(node.input[2])
    return value is not None and not numpy_helper.to_array(value).any()
