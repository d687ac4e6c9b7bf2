"""Where a program rounds: shared, repeated and added quantize and dequantize operators in a ``torch.fx`` graph.

A *rounding* is such a pair, behind a clamp where its grid has fewer than 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.ao.quantization import quantize_fx as quantize_fx  # defines the operators
from torch.fx import Graph, GraphModule, Interpreter, Node

from repapq_plugin.core.quant_primitives import CONTAINERS, choose_qparams

aten = torch.ops.aten
operators = torch.ops.quantized_decomposed
QUANTIZE = operators.quantize_per_tensor.default
DEQUANTIZE = operators.dequantize_per_tensor.default
CLAMP = aten.hardtanh.default
"""Clamps by the operator that compilers join with a layer before it."""

CODES = CONTAINERS[torch.int8]

WEIGHTS = (operators.dequantize_per_channel.default, DEQUANTIZE)
"""Operators that make float weights of int8 codes."""

LAYERS = (
    *(aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding),
    *(aten.conv3d.default, aten.conv3d.padding, aten.conv_transpose2d.input, aten.linear.default),
)
"""Operators of layers that are quantized; the second argument is the weight."""

JOINED = (aten.relu.default, aten.relu_.default, aten.clamp.default, aten.hardtanh.default, aten.hardtanh_.default)
"""Activations that compilers compute inside the layer before them, from its integer sums."""

RELUS = (aten.relu.default, aten.relu_.default)

MOVING = (
    *(aten.cat.default, aten.max_pool2d.default, aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default),
    *(aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.permute.default, aten.transpose.int),
    *(aten.slice.Tensor, aten.unsqueeze.default, aten.squeeze.dim, aten.contiguous.default, aten.clone.default),
)
"""Operators whose output holds nothing but values of their inputs: rounding them before or after is the same."""


@dataclass(frozen=True)
class Grid:
    """A grid of int8 codes for a whole tensor.

    Args:
        scale: Its step.
        zero_point: The code of the real 0, from -128 to 127.
        clamp_range: Real values of the first and last code where the grid has fewer than 8 bits.
    """

    scale: float
    zero_point: int
    clamp_range: tuple[float, float] | None = None

    @property
    def arguments(self) -> tuple[float, int, int, int, torch.dtype]:
        """What both operators take behind the tensor."""
        return self.scale, self.zero_point, *CODES, torch.int8

    def rounded(self, x: Tensor) -> Tensor:
        """Round ``x``, float, any shape, through the two operators."""
        if self.clamp_range is not None:
            x = CLAMP(x, *self.clamp_range)
        return cast(Tensor, operators.dequantize_per_tensor(QUANTIZE(x, *self.arguments), *self.arguments))

    def round_node(self, graph: Graph, source: Node) -> Node:
        """Write the same behind a node, and return the last operator."""
        with graph.inserting_after(source):
            node = source
            if self.clamp_range is not None:
                node = graph.call_function(CLAMP, (node, *self.clamp_range))
        for target in (QUANTIZE, DEQUANTIZE):
            with graph.inserting_after(node):
                node = graph.call_function(target, (node, *self.arguments))
        return node


@dataclass(frozen=True)
class Rounding:
    """One rounding in a graph.

    Args:
        source: What is rounded.
        first: The node of the rounding that reads it.
        last: Its dequantize operator.
        grid: To what it is rounded.
    """

    source: Node
    first: Node
    last: Node
    grid: Grid


def roundings(graph: Graph) -> Iterator[Rounding]:
    """Yield the roundings of activations in order."""
    for last in list(graph.nodes):
        if last.target is not DEQUANTIZE or cast(Node, last.args[0]).target is not QUANTIZE:
            continue
        first = cast(Node, last.args[0])
        source, clamp = cast(Node, first.args[0]), None
        if source.target is CLAMP and len(source.users) == 1 and len(source.args) == 3:
            clamp = cast("tuple[float, float]", tuple(source.args[1:]))
            first, source = source, cast(Node, source.args[0])
        yield Rounding(source, first, last, Grid(cast(float, last.args[1]), cast(int, last.args[2]), clamp))


def read_instead(node: Node, made: Node) -> None:
    """Let all that reads a node read another, but for that one."""
    for reader in list(node.users):
        if reader is not made:
            reader.replace_input_with(node, made)


def share_roundings(module: GraphModule) -> None:
    """Let all readers of a tensor on one grid read the same rounding, in place."""
    kept: dict[tuple[Node, Grid], Node] = {}
    for rounding in roundings(module.graph):
        node = kept.setdefault((rounding.source, rounding.grid), rounding.last)
        if node is not rounding.last:
            rounding.last.replace_all_uses_with(node)
    _clean(module)


def round_sources(module: GraphModule) -> None:
    """Repeat each rounding in front of operators that only move values, in place; no value changes."""
    for rounding in reversed(list(roundings(module.graph))):
        source = rounding.source
        if source.target not in MOVING or {user for user in source.users} != {rounding.first}:
            continue
        pending = [source]
        while pending:
            moving = pending.pop()
            for given in moving.all_input_nodes:
                if given.target is DEQUANTIZE:
                    continue
                moving.replace_input_with(given, rounding.grid.round_node(module.graph, given))
                if given.target in MOVING and len(given.users) == 1:
                    pending.append(given)
    share_roundings(module)


def round_results(module: GraphModule) -> None:
    """Round again what operators give that only move values of one grid, in place: they compute in integers then."""
    for node in list(module.graph.nodes):
        given = node.all_input_nodes
        if node.target not in MOVING or any(each.target is not DEQUANTIZE for each in given):
            continue
        grids = {each.args[1:] for each in given}
        if len(grids) != 1 or {user.args[1:] for user in node.users if user.target is QUANTIZE} == grids:
            continue
        readers = [user for user in node.users if user.target is not QUANTIZE or user.args[1:] not in grids]
        scale, zero_point, *_ = grids.pop()
        rounded = Grid(cast(float, scale), cast(int, zero_point)).round_node(module.graph, node)
        for reader in readers:
            reader.replace_input_with(node, rounded)
    share_roundings(module)


def merge_grids(module: GraphModule) -> None:
    """Let all that reads a tensor on several grids of 8 bits read it on one, in place.

    That of a concatenation goes first, since all its inputs need it, and otherwise the widest. Rounding twice in a row,
    which the others would do, is what LiteRT's converter cannot write.
    """
    by_source: dict[Node, list[Rounding]] = {}
    for rounding in roundings(module.graph):
        if rounding.grid.clamp_range is None:
            by_source.setdefault(rounding.source, []).append(rounding)
    for found in by_source.values():
        joined = [each for each in found if any(user.target is aten.cat.default for user in each.last.users)]
        kept = max(joined or found, key=lambda each: each.grid.scale)
        for other in found:
            if other is not kept and other not in joined:
                other.last.replace_all_uses_with(kept.last)
    _clean(module)


def join_clamps(module: GraphModule) -> None:
    """Make one clamp of a ReLU and the clamp of a rounding behind it, in place: compilers take one, not two."""
    for rounding in list(roundings(module.graph)):
        source, clamp = rounding.source, rounding.first
        if rounding.grid.clamp_range is None:
            continue
        low, high = rounding.grid.clamp_range
        if source.target in RELUS and set(source.users) == {clamp}:
            clamp.args = (source.args[0], max(0.0, low), high)
    _clean(module)


def keep_pooled(module: GraphModule) -> None:
    """Write pooling in the form that compilers take, in place: strides said, means over images keeping their axes."""
    for node in list(module.graph.nodes):
        if node.target is aten.max_pool2d.default and len(node.args) == 2:
            node.args = (*node.args, node.args[1])
        axes = [axis % 4 for axis in cast("list[int]", node.args[1])] if node.target is aten.mean.dim else []
        kept = len(node.args) > 2 and bool(node.args[2])
        if sorted(axes) != [2, 3] or kept or node.meta["val"].dim() != 2:
            continue
        with module.graph.inserting_after(node):
            flat = module.graph.call_function(aten.reshape.default, (node, list(node.meta["val"].shape)))
        read_instead(node, flat)
        node.args = (node.args[0], [2, 3], True)
    _clean(module)


def dequantize_for_each(module: GraphModule) -> None:
    """Let each reader of rounded values have a dequantize operator of its own, in place, as pt2e writes it."""
    for node in list(module.graph.nodes):
        if node.target not in WEIGHTS:
            continue
        for reader in list(node.users)[1:]:
            with module.graph.inserting_after(node):
                own = module.graph.call_function(node.target, node.args)
            reader.replace_input_with(node, own)
    _clean(module)


def _path_of(weight: Node) -> str:
    """Return the module path of the layer whose weight an operator makes."""
    return str(cast(Node, weight.args[0]).target).removesuffix(".weight_codes").removeprefix("model.")


def layer_calls(module: GraphModule) -> dict[Node, str]:
    """Return the calls of layers that read integers and have integer weights, with the layers' module paths."""
    rounded = {rounding.last for rounding in roundings(module.graph)}
    return {
        node: _path_of(cast(Node, node.args[1]))
        for node in module.graph.nodes
        if node.target in LAYERS and cast(Node, node.args[1]).target in WEIGHTS and node.args[0] in rounded
    }


def _output_of(layer: Node) -> Node:
    """Return what a layer gives, behind activations that are computed inside it."""
    node = layer
    while len(node.users) == 1 and (user := next(iter(node.users))).target in JOINED:
        node = user
    return node


def _grids_of(output: Node, found: Sequence[Rounding]) -> list[Grid]:
    return [rounding.grid for rounding in found if rounding.source is output or rounding.first is output]


def float_outputs(module: GraphModule) -> dict[Node, str]:
    """Return those of `layer_calls` whose output something reads unrounded, or on two grids."""
    return {layer: name for layer, name in layer_calls(module).items() if not _is_rounded(_output_of(layer))}


def _is_rounded(output: Node) -> bool:
    """Whether all that reads a tensor rounds it on one grid."""
    return len({(user.target is QUANTIZE, user.args[1:]) for user in output.users}) == 1 and all(
        user.target is QUANTIZE for user in output.users
    )


def round_outputs(module: GraphModule, batches: Sequence[tuple[Tensor, ...]]) -> None:
    """Round the outputs of `float_outputs` on the grid on which other layers read them, or on one of 8 bits, in place.

    Args:
        module: The graph.
        batches: What it runs on, to see ranges.
    """
    outputs = {_output_of(layer) for layer in float_outputs(module)}
    ranges = _Ranges(module, outputs)
    with torch.no_grad():
        for batch in batches:
            ranges.run(*batch)
    found = list(roundings(module.graph))
    for output in outputs:
        known = _grids_of(output, found)
        grid = known[0] if known else ranges.grid(output)
        readers = [user for user in output.users if user.args[1:] != grid.arguments or user.target is not QUANTIZE]
        node = grid.round_node(module.graph, output)
        for reader in readers:
            reader.replace_input_with(output, node)
    share_roundings(module)


class _Ranges(Interpreter):
    """Runs a graph and keeps the range of some nodes."""

    def __init__(self, module: GraphModule, nodes: set[Node]) -> None:
        super().__init__(module)
        self.nodes = nodes
        self.found: dict[Node, tuple[Tensor, Tensor]] = {}

    def run_node(self, n: Node) -> object:
        result = super().run_node(n)
        if n in self.nodes:
            low, high = cast(Tensor, result).aminmax()
            before = self.found.get(n, (low, high))
            self.found[n] = torch.minimum(low, before[0]), torch.maximum(high, before[1])
        return result

    def grid(self, node: Node) -> Grid:
        """Return the affine 8-bit grid over the range of a node."""
        scale, zero_point = choose_qparams(*self.found[node], *CODES, symmetric=False)
        return Grid(float(scale), int(zero_point))


def _clean(module: GraphModule) -> None:
    module.graph.eliminate_dead_code()
    module.recompile()
