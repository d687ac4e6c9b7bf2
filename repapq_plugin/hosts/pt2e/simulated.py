"""From a prepared pt2e graph back to quantized layers, the form that `export_onnx` and `export_openvino` take."""

from __future__ import annotations

import copy
from typing import TypedDict, cast

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from repapq_plugin.errors import HostError
from repapq_plugin.hosts.pt2e.graph import aten, layer_nodes, quantizer_at
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize
from repapq_plugin.quantizers.layers import quantize_layer


def quantized_network(prepared: GraphModule) -> GraphModule:
    """Return the network of a prepared and calibrated graph with `QuantizedLayer` in place of its layers.

    Args:
        prepared: From `prepare_learned` or `carry_over`, or from ``prepare_qat_pt2e`` with our fake
            quantizers after calibration and ``disable_observer``; not changed.

    Raises:
        HostError: No layer of the graph has fake quantizers of ours.
    """
    network = copy.deepcopy(prepared)
    count = 0
    for node in list(layer_nodes(network)):
        source, weight = (quantizer_at(network, node.args[position]) for position in (0, 1))
        if not isinstance(source, LearnableFakeQuantize) or not isinstance(weight, LearnableFakeQuantize):
            continue
        name = f"quantized_layer_{count}"
        network.add_submodule(name, quantize_layer(_module_of(network, node), weight, source))
        with network.graph.inserting_before(node):
            called = network.graph.call_module(name, (cast(Node, node.args[0]).args[0],))
        node.replace_all_uses_with(called)
        network.graph.erase_node(node)
        count += 1
    if not count:
        raise HostError("No layer of the graph has fake quantizers of ours; prepare it with prepare_learned.")
    network.graph.eliminate_dead_code()
    network.recompile()
    return network


def _module_of(network: GraphModule, node: Node) -> nn.Module:
    """Return the layer that a node computes, as a module."""
    arguments: list[object] = [*node.args, *[None] * 9]
    weight = _tensor(network, cast(Node, node.args[1]).args[0])
    bias = None if arguments[2] is None else _tensor(network, arguments[2])
    if node.target is aten.linear.default:
        return _filled(nn.Linear(weight.shape[1], weight.shape[0]), weight, bias)
    rows, columns = weight.shape[2:]
    settings = _Settings(stride=_pair(arguments[3], 1), groups=int(cast(int, arguments[6] or 1)))
    if node.target is aten.conv_transpose2d.input:
        made: nn.Module = nn.ConvTranspose2d(
            weight.shape[0],
            weight.shape[1] * settings["groups"],
            (rows, columns),
            padding=_pair(arguments[4], 0),
            output_padding=_pair(arguments[5], 0),
            dilation=_pair(arguments[7], 1),
            **settings,
        )
    else:
        padding = arguments[4]
        made = nn.Conv2d(
            weight.shape[1] * settings["groups"],
            weight.shape[0],
            (rows, columns),
            padding=padding if isinstance(padding, str) else _pair(padding, 0),
            dilation=_pair(arguments[5], 1),
            **settings,
        )
    return _filled(made, weight, bias)


class _Settings(TypedDict):
    stride: tuple[int, int]
    groups: int


def _pair(argument: object, default: int) -> tuple[int, int]:
    """Return a stride, a padding or a dilation for both axes; an operator leaves out what is ``default``."""
    given = argument if isinstance(argument, list | tuple) else [argument or default]
    return cast(int, given[0]), cast(int, given[-1])


def _tensor(network: GraphModule, node: object) -> Tensor:
    path, _, name = str(cast(Node, node).target).rpartition(".")
    return cast(Tensor, getattr(network.get_submodule(path), name))


def _filled(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
    return layer
