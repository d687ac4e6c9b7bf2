"""What an exported graph says about layers: which nodes they are, and where in the network they stood."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import FakeQuantizeBase, ObserverBase

aten = torch.ops.aten

LAYER_TARGETS: dict[object, int] = {
    aten.conv1d.default: 0,
    aten.conv1d.padding: 0,
    aten.conv2d.default: 0,
    aten.conv2d.padding: 0,
    aten.conv3d.default: 0,
    aten.conv3d.padding: 0,
    aten.linear.default: 0,
    aten.conv_transpose2d.input: 1,
}
"""Operators that are quantized, with the axis of output channels of their weight."""


def layer_nodes(graph: GraphModule) -> Iterator[Node]:
    """Yield the nodes of quantizable layers in order."""
    return (node for node in graph.graph.nodes if node.op == "call_function" and node.target in LAYER_TARGETS)


def output_axis(node: Node) -> int:
    """Return the axis of output channels of a layer's weight."""
    return LAYER_TARGETS[node.target]


def groups(node: Node) -> int:
    """Return the number of groups of a convolution (1 of a linear layer)."""
    if node.target is aten.linear.default:
        return 1
    return int(cast(int, node.args[6])) if len(node.args) > 6 else 1


PADS = (aten.pad.default, aten.constant_pad_nd.default)
"""Operators that pad; what they add may be a value in `constant_of`."""


def constant_of(pad: Node) -> float:
    """Return the value that one of `PADS` adds; 0 where it repeats what is there, which is on any grid as well."""
    constants = pad.target is aten.constant_pad_nd.default or (list(pad.args) + ["constant"])[2] == "constant"
    at = 2 if pad.target is aten.constant_pad_nd.default else 3
    value = pad.args[at] if constants and len(pad.args) > at else pad.kwargs.get("value")
    return float(cast(float, value or 0))


def quantizer_at(graph: GraphModule, node: object) -> torch.nn.Module | None:
    """Return the observer or fake quantizer that ``node`` calls, if it calls one."""
    if not isinstance(node, Node) or node.op != "call_module":
        return None
    module = graph.get_submodule(str(node.target))
    return module if isinstance(module, ObserverBase | FakeQuantizeBase) else None


def ends(graph: GraphModule) -> tuple[set[Node], set[Node]]:
    """Return the layers that read nothing another layer made, and those whose output no other layer reads."""
    layers = set(layer_nodes(graph))
    behind: set[Node] = set()
    for node in graph.graph.nodes:
        if any(source in behind or source in layers for source in _data_inputs(node, layers)):
            behind.add(node)
    first = {layer for layer in layers if layer not in behind}
    ahead: set[Node] = set()
    for node in reversed(graph.graph.nodes):
        if any(user.op == "output" or (user in ahead and user not in layers) for user in node.users):
            ahead.add(node)
    return first, layers & ahead


def _data_inputs(node: Node, layers: set[Node]) -> list[Node]:
    return [cast(Node, node.args[0])] if node in layers else node.all_input_nodes
