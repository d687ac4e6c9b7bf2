"""Where an ONNX graph rounds: pairs repeated in front of operators that only move values, and integer biases.

Runtimes compute such an operator, and the layer before it, in integers where pairs stand on both sides of it. Rounding
before or after moving is the same, so no value changes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from repapq_plugin.core.onnx_weights import GraphNamer, weight_nodes
from repapq_plugin.export.onnx_tidy import digest, drop_unused, merge_equal_nodes, rewire

if TYPE_CHECKING:
    import onnx

MOVING = ("Concat", "MaxPool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Resize")
"""Operators that give nothing but values of what they read; a Resize only if it takes the nearest."""


@dataclass(frozen=True)
class _Pair:
    """One rounding of an activation: its nodes in order, perhaps with a Clip first."""

    nodes: tuple[onnx.NodeProto, ...]

    @property
    def source(self) -> str:
        """The value that is rounded."""
        return str(self.nodes[0].input[0])

    @property
    def result(self) -> str:
        """What comes out."""
        return str(self.nodes[-1].output[0])


def repeat_roundings(graph: onnx.GraphProto, operators: Collection[str]) -> None:
    """Repeat each pair in front of operators that only move values, in place, and drop pairs that change nothing.

    Args:
        graph: A tidied graph.
        operators: Which of `MOVING` the target computes in integers.
    """
    _drop_repeated(graph)
    results = {value.name for value in graph.output}
    namer = GraphNamer(graph)
    pending = list(_pairs(graph))[::-1]
    while pending:
        pair = pending.pop()
        made, read = _makers(graph), _readers(graph)
        mover = made.get(pair.source)
        if mover is None or not _moves(mover, operators) or pair.source in results:
            continue
        if any(reader is not pair.nodes[0] for reader in read[pair.source]):
            continue
        for place, given in enumerate(mover.input[: None if mover.op_type == "Concat" else 1]):
            if given in made and made[given].op_type == "DequantizeLinear":
                continue
            repeated = _repeated(graph, pair, given, namer)
            mover.input[place] = repeated.result
            pending.append(repeated)
    merge_equal_nodes(graph)
    drop_unused(graph)


def _pairs(graph: onnx.GraphProto) -> Iterator[_Pair]:
    """Yield the pairs on activations in order."""
    made, read = _makers(graph), _readers(graph)
    for last in graph.node:
        quantize = made.get(last.input[0]) if last.op_type == "DequantizeLinear" else None
        if quantize is None or quantize.op_type != "QuantizeLinear":
            continue
        clip = made.get(quantize.input[0])
        alone = clip is not None and clip.op_type == "Clip" and len(read[clip.output[0]]) == 1
        yield _Pair((clip, quantize, last) if clip is not None and alone else (quantize, last))


def _grid(pair: _Pair, digests: Mapping[str, str]) -> tuple[str, ...]:
    """Return what decides the values of a pair: equal for equal grids, by the digests of stored tensors."""
    return tuple(digests.get(name, name) for node in pair.nodes[:-1] for name in node.input[1:])


def _moves(node: onnx.NodeProto, operators: Collection[str]) -> bool:
    if node.op_type not in MOVING or node.op_type not in operators or len(node.output) != 1:
        return False
    modes = [attribute.s for attribute in node.attribute if attribute.name == "mode"]
    return node.op_type != "Resize" or not modes or modes == [b"nearest"]


def _repeated(graph: onnx.GraphProto, pair: _Pair, given: str, namer: GraphNamer) -> _Pair:
    """Return the same rounding of another value: what is there already, or a pair that is written for it."""
    import onnx

    digests = {tensor.name: digest(tensor) for tensor in graph.initializer}
    for known in _pairs(graph):
        if known.source == given and _grid(known, digests) == _grid(pair, digests):
            return known
    place = next((i + 1 for i, node in enumerate(graph.node) if given in node.output), 0)
    nodes = []
    for node in pair.nodes:
        twin = onnx.NodeProto()
        twin.CopyFrom(node)
        twin.name, twin.input[0], twin.output[0] = namer.fresh(node.name), given, namer.fresh(node.output[0])
        graph.node.insert(place, twin)
        nodes.append(graph.node[place])
        place, given = place + 1, twin.output[0]
    return _Pair(tuple(nodes))


def _drop_repeated(graph: onnx.GraphProto) -> None:
    """Let what reads a pair of a pair's result read that, where both have one grid."""
    digests = {tensor.name: digest(tensor) for tensor in graph.initializer}
    results = {value.name for value in graph.output}
    grids: dict[str, tuple[str, ...]] = {}
    for pair in _pairs(graph):
        grids[pair.result] = _grid(pair, digests)
        if grids.get(pair.source) == grids[pair.result] and pair.result not in results:
            rewire(graph, pair.result, pair.source)
    drop_unused(graph)


def store_biases(graph: onnx.GraphProto) -> None:
    """Store biases of linear layers that are whole numbers of input scale times weight scale so, in place.

    onnxruntime computes a Gemm in integers only with such a bias. A bias that is none stays float.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    made = _makers(graph)
    stored = {tensor.name: tensor for tensor in graph.initializer}
    weights = {node.output[0]: node for node in weight_nodes(graph)}
    namer = GraphNamer(graph)
    for layer in [node for node in graph.node if node.op_type == "Gemm" and len(node.input) == 3]:
        source, weight, bias = made.get(layer.input[0]), weights.get(layer.input[1]), stored.get(layer.input[2])
        if source is None or source.op_type != "DequantizeLinear" or weight is None or bias is None:
            continue
        values = numpy_helper.to_array(bias)
        scales = [numpy_helper.to_array(stored[node.input[1]]) for node in (source, weight)]
        unit = (scales[0] * scales[1]).astype(np.float32)
        codes = np.round(values / unit)
        if values.dtype != np.float32 or np.abs(codes).max(initial=0) >= 2**31 or np.any(codes * unit != values):
            continue
        codes = codes.astype(np.int32)
        tensors = {
            f"{bias.name}.codes": codes,
            f"{bias.name}.scale": unit,
            f"{bias.name}.zero_point": np.zeros(unit.shape, np.int32),
        }
        names = [namer.fresh(name) for name in tensors]
        graph.initializer.extend(map(numpy_helper.from_array, tensors.values(), names))
        layer.input[2] = namer.fresh(f"{bias.name}.dequantized")
        node = helper.make_node(
            "DequantizeLinear", names, [layer.input[2]], name=namer.fresh(f"{layer.name}/Bias"), axis=0
        )
        graph.node.insert(list(graph.node).index(layer), node)
    drop_unused(graph)


def _makers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in graph.node for name in node.output}


def _readers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found
