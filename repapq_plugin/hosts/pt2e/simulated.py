"""From a prepared pt2e graph back to quantized layers, the form that `export_onnx` and `export_openvino` take."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TypedDict, cast

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from repapq_plugin.errors import HostError
from repapq_plugin.hosts.pt2e._compat import module_path
from repapq_plugin.hosts.pt2e.graph import PADS, aten, constant_of, layer_nodes, quantizer_at
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize
from repapq_plugin.quantizers.layers import quantize_layer

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
"""Convolutions by the number of axes that they move along."""


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
        read = _unpadded(node)
        source, weight = quantizer_at(network, read), quantizer_at(network, node.args[1])
        if not isinstance(source, LearnableFakeQuantize) or not isinstance(weight, LearnableFakeQuantize):
            continue
        name = f"quantized_layer_{count}"
        network.add_submodule(name, quantize_layer(_module_of(network, node), weight, source))
        with network.graph.inserting_before(node):
            unrounded = cast(Node, cast(Node, read).args[0])
            if read is node.args[0]:
                called = network.graph.call_module(name, (unrounded,))
            else:  # rounding what is padded is the same as padding what is rounded
                _read_unrounded(network, node, cast(Node, read), unrounded)
                called = network.graph.call_module(name, (node.args[0],))
        node.replace_all_uses_with(called)
        network.graph.erase_node(node)
        count += 1
    if not count:
        raise HostError("No layer of the graph has fake quantizers of ours; prepare it with prepare_learned.")
    network.graph.eliminate_dead_code()
    network.recompile()
    return network


def _unpadded(layer: Node) -> object:
    """Return what a layer reads, as it is before it is padded.

    Raises:
        HostError: What is added does not lie on every grid.
    """
    read = layer.args[0]
    while isinstance(read, Node) and read.target in PADS:
        if constant_of(read):
            raise HostError(
                f"{module_path(layer)!r} pads with {constant_of(read)}, which its grid need not have; pad with 0, or "
                "keep the layer float with keep_float."
            )
        read = read.args[0]
    return read


def _read_unrounded(network: GraphModule, layer: Node, rounded: Node, unrounded: Node) -> None:
    """Let what pads for a layer read a tensor without its quantizer; others that read the padded one as well too."""
    pad = cast(Node, layer.args[0])
    while pad.args[0] is not rounded:
        pad = cast(Node, pad.args[0])
    pad.replace_input_with(rounded, unrounded)


def _module_of(network: GraphModule, node: Node) -> nn.Module:
    """Return the layer that a node computes, as a module."""
    arguments: list[object] = [*node.args, *[None] * 9]
    weight = _tensor(network, cast(Node, node.args[1]).args[0])
    bias = None if arguments[2] is None else _tensor(network, arguments[2])
    if node.target is aten.linear.default:
        return _filled(nn.Linear(weight.shape[1], weight.shape[0]), weight, bias)
    size = tuple(weight.shape[2:])
    numbers = partial(_numbers, count=len(size))
    settings = _Settings(stride=numbers(arguments[3], 1), groups=int(cast(int, arguments[6] or 1)))
    if node.target is aten.conv_transpose2d.input:
        transposed: Callable[..., nn.Module] = nn.ConvTranspose2d
        made = transposed(
            weight.shape[0],
            weight.shape[1] * settings["groups"],
            size,
            padding=numbers(arguments[4], 0),
            output_padding=numbers(arguments[5], 0),
            dilation=numbers(arguments[7], 1),
            **settings,
        )
    else:
        kind: Callable[..., nn.Module] = CONVOLUTIONS[len(size)]
        padding = arguments[4]
        made = kind(
            weight.shape[1] * settings["groups"],
            weight.shape[0],
            size,
            padding=padding if isinstance(padding, str) else numbers(padding, 0),
            dilation=numbers(arguments[5], 1),
            **settings,
        )
    return _filled(made, weight, bias)


class _Settings(TypedDict):
    stride: tuple[int, ...]
    groups: int


def _numbers(argument: object, default: int, count: int) -> tuple[int, ...]:
    """Return a stride, a padding or a dilation for all axes; an operator leaves out what is ``default``."""
    given = argument if isinstance(argument, list | tuple) else [argument or default]
    return tuple(cast("list[int]", given)) if len(given) == count else (cast(int, given[0]),) * count


def _tensor(network: GraphModule, node: object) -> Tensor:
    path, _, name = str(cast(Node, node).target).rpartition(".")
    return cast(Tensor, getattr(network.get_submodule(path), name))


def _filled(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
    return layer
