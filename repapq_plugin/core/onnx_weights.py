"""Integer weights in an ONNX graph, each the reader's own: what runtimes that rewrite weights in place can load."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

WEIGHTED_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators of the layers that are quantized."""

NARROW = (-64, 63)
"""Codes that onnxruntime never widens to unsigned ones: sums of their products do not overflow 16 bits."""


class GraphNamer:
    """Gives names that no value and no node of a graph has.

    Args:
        graph: The graph; names that it gets later have to come from here.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._taken = {value.name for values in (graph.input, graph.output, graph.initializer) for value in values}
        for node in graph.node:
            self._taken.update((node.name, *node.input, *node.output))

    def fresh(self, name: str) -> str:
        """Return ``name``, or ``name.2``, ``name.3``... where that is taken."""
        chosen, count = name, 1
        while chosen in self._taken:
            count += 1
            chosen = f"{name}.{count}"
        self._taken.add(chosen)
        return chosen


def weight_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the DequantizeLinear nodes that read a stored weight."""
    stored = {tensor.name for tensor in graph.initializer}
    for node in list(graph.node):
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            yield node


def integer_layers(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the convolutions and matrix products whose weight is stored in integers."""
    weights = {node.output[0] for node in weight_nodes(graph)}
    return [node for node in graph.node if node.op_type in WEIGHTED_OPERATORS and node.input[1] in weights]


def values_read(node: onnx.NodeProto) -> set[str]:
    """Return the names of the values that a node reads, in its subgraphs too."""
    names = set(node.input)
    for attribute in node.attribute:
        for subgraph in (attribute.g, *attribute.graphs):
            names.update(value.name for value in subgraph.output)
            for inner in subgraph.node:
                names |= values_read(inner)
    return names


def separate_weights(graph: onnx.GraphProto) -> None:
    """Give each weight a zero point of its own, and each reader of a weight of 8 bits a copy of its own, in place.

    Layers share them in the graph where their codes are equal or one layer is called more than once. Where
    onnxruntime must not saturate (``session.x64quantprecision``) it turns signed weights into unsigned ones under a
    name made from theirs, and fails at the second reader. It leaves weights alone whose codes have 7 bits (`NARROW`).
    """
    import onnx

    namer = GraphNamer(graph)
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in weight_nodes(graph):
        if _is_wide(stored[node.input[0]]):
            readers = [(reader, i) for reader in graph.node for i, x in enumerate(reader.input) if x == node.output[0]]
            for reader, i in readers[1:]:
                twin = onnx.NodeProto()
                twin.CopyFrom(node)
                twin.name, twin.output[0] = namer.fresh(node.name), namer.fresh(node.output[0])
                graph.node.insert(list(graph.node).index(node) + 1, twin)
                reader.input[i] = twin.output[0]
    taken: set[str] = set()
    for node in weight_nodes(graph):
        codes = node.input[0]
        for i, name in ((0, codes), (2, f"{codes}.zero_point")):
            if i >= len(node.input) or (i == 0 and not _is_wide(stored[codes])):
                continue
            if node.input[i] in taken:
                own = onnx.TensorProto()
                own.CopyFrom(stored[node.input[i]])
                own.name = node.input[i] = namer.fresh(name)
                graph.initializer.append(own)
                stored[own.name] = own
            taken.add(node.input[i])


def _is_wide(codes: onnx.TensorProto) -> bool:
    import onnx.numpy_helper

    array = onnx.numpy_helper.to_array(codes)
    return bool(array.size) and (int(array.min()) < NARROW[0] or int(array.max()) > NARROW[1])
