"""The shortest form of a traced ONNX graph: what runtimes turn into integer kernels. Its meaning stays."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from repapq_plugin.core.onnx_weights import separate_weights, values_read, weight_nodes
from repapq_plugin.export.onnx_padding import move_codes, spell_out_padding

if TYPE_CHECKING:
    import onnx

MERGED_OPERATORS = ("Clip", "QuantizeLinear", "DequantizeLinear")
"""Nodes that become one where several say the same."""


def tidy(graph: onnx.GraphProto) -> None:
    """Bring the traced graph to its shortest form; its meaning stays."""
    _constants_to_initializers(graph)
    _drop_identities(graph)
    _drop_flat_weights(graph)
    merge_equal_nodes(graph)
    _transpose_weights(graph)
    spell_out_padding(graph)
    move_codes(graph)
    separate_weights(graph)
    drop_unused(graph)
    del graph.value_info[:]


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    for node in list(graph.node):
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = node.attribute[0].t
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
            graph.node.remove(node)


def rewire(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Let every reader of value ``old`` read ``new`` (readers inside subgraphs too)."""
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                if subgraph.node:
                    rewire(subgraph, old, new)


def _drop_identities(graph: onnx.GraphProto) -> None:
    results = {value.name for value in graph.output}
    for node in list(graph.node):
        if node.op_type == "Identity" and node.output[0] not in results:
            rewire(graph, node.output[0], node.input[0])
            graph.node.remove(node)


def _drop_flat_weights(graph: onnx.GraphProto) -> None:
    """Remove what flattens a matrix to a matrix: torch returns the same one, and the tracer takes it for another."""
    results = {value.name for value in graph.output}
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    matrices |= {node.output[0] for node in weight_nodes(graph) if node.input[0] in matrices}
    for node in list(graph.node):
        if node.op_type != "Flatten" or node.input[0] not in matrices or node.output[0] in results:
            continue
        if all(attribute.i == 1 for attribute in node.attribute):
            rewire(graph, node.output[0], node.input[0])
            graph.node.remove(node)


def digest(tensor: onnx.TensorProto) -> str:
    """Return type, shape and a hash of the values: equal for equal tensors, whatever their names."""
    import onnx.numpy_helper

    array = onnx.numpy_helper.to_array(tensor)
    return f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"


def merge_equal_nodes(graph: onnx.GraphProto) -> None:
    """Let layers that read one tensor on one grid share its quantize/dequantize pair."""
    digests = {tensor.name: digest(tensor) for tensor in graph.initializer}
    results = {value.name for value in graph.output}
    first: dict[tuple[object, ...], str] = {}
    for node in list(graph.node):  # in topological order, so inputs are merged before their readers
        if node.op_type not in MERGED_OPERATORS or node.output[0] in results:
            continue
        attributes = tuple(sorted(a.SerializeToString() for a in node.attribute))
        key = (node.op_type, *(digests.get(name, name) for name in node.input), attributes)
        if key in first:
            rewire(graph, node.output[0], first[key])
            graph.node.remove(node)
        else:
            first[key] = node.output[0]


def _transpose_weights(graph: onnx.GraphProto) -> None:
    """Store the weight of a matrix product the way round that it is read."""
    import onnx
    from onnx import helper, numpy_helper

    initializers = {tensor.name: tensor for tensor in graph.initializer}
    dequantize = (node for node in graph.node if node.op_type == "DequantizeLinear")
    weights = {node.output[0]: node for node in dequantize if node.input[0] in initializers}
    for node in list(graph.node):
        # The tracer turns the weight of a matrix product around by a node of its own for each call.
        if node.op_type != "Transpose" or node.input[0] not in weights:
            continue
        source = weights[node.input[0]]
        codes = numpy_helper.to_array(initializers[source.input[0]])
        if codes.ndim != 2:
            continue
        name = f"{source.input[0]}_by_input"
        if name not in initializers:
            initializers[name] = numpy_helper.from_array(codes.T.copy(), name)
            graph.initializer.append(initializers[name])
        twin = onnx.NodeProto()
        twin.CopyFrom(source)
        twin.name, twin.input[0], twin.output[0] = node.name, name, node.output[0]
        axis = next(a.i for a in source.attribute if a.name == "axis")
        del twin.attribute[:]
        twin.attribute.append(helper.make_attribute("axis", 1 - axis))
        node.CopyFrom(twin)


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove weight nodes and initializers that nothing reads any more."""
    used = _names_read(graph)
    for node in reversed(list(graph.node)):
        if node.op_type in MERGED_OPERATORS and node.output[0] not in used:
            graph.node.remove(node)
    used = _names_read(graph)
    for tensor in list(graph.initializer):
        if tensor.name not in used:
            graph.initializer.remove(tensor)


def _names_read(graph: onnx.GraphProto) -> set[str]:
    names = {value.name for value in graph.output}
    for node in graph.node:
        names |= values_read(node)
    return names
