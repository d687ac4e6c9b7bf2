"""A calibrated network as a prepared pt2e graph: learned quantizers in place of observed ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer import Quantizer

from repapq_plugin.errors import HostError
from repapq_plugin.export.deploy import without_quantizers
from repapq_plugin.export.qdq_onnx import quantized_module
from repapq_plugin.hosts.hosted import quantized_layers
from repapq_plugin.hosts.pt2e._compat import copy_facts, module_path
from repapq_plugin.hosts.pt2e.fake_quantize import LearnableFakeQuantize, PerChannelLearnableFakeQuantize
from repapq_plugin.hosts.pt2e.graph import layer_nodes, quantizer_at
from repapq_plugin.hosts.pt2e.grid import carry_grid
from repapq_plugin.hosts.pt2e.observers import TorchaoObserver
from repapq_plugin.hosts.pt2e.quantizer import RepAPQQuantizer
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize as CoreFakeQuantize
from repapq_plugin.quantizers.own_forward import is_plain
from repapq_plugin.result import Calibrated

DynamicShapes = dict[str, object] | tuple[object, ...] | list[object]
"""Open dimensions, as ``torch.export.export`` takes them."""


def prepare_learned(
    model_or_result: nn.Module | Calibrated,
    example_inputs: tuple[object, ...],
    *,
    quantizer: Quantizer | None = None,
    dynamic_shapes: DynamicShapes | None = None,
    strict: bool = False,
) -> GraphModule:
    """Return what pt2e prepares of a calibrated network, with the calibration's result in it.

    Args:
        model_or_result: From `quantize_model`, or a module that holds its network; not changed.
        example_inputs: All arguments of its ``forward``, as a tuple.
        quantizer: What prepares the graph; default: `RepAPQQuantizer`.
        dynamic_shapes: Open dimensions, as ``torch.export.export`` takes them.
        strict: As ``torch.export.export`` takes it.

    Returns:
        The prepared graph, ready for ``convert_pt2e``; it computes what the calibrated network does.

    Raises:
        HostError: The network cannot be exported, holds no quantized layer, or the export lost one.
    """
    model = quantized_module(model_or_result)
    quantized_layers(model)
    try:
        program = torch.export.export(
            without_quantizers(model), example_inputs, dynamic_shapes=dynamic_shapes, strict=strict
        )
    except Exception as error:  # whatever a forward does that a program cannot hold
        raise HostError(
            f"{type(model).__name__} cannot be exported ({type(error).__name__}: {error}). Quantize the part "
            "that maps tensors to tensors, or run the simulated network."
        ) from error
    prepared = prepare_pt2e(program.module(), quantizer or RepAPQQuantizer())
    return carry_over(model, prepared)


def carry_over(model_or_result: nn.Module | Calibrated, prepared: GraphModule) -> GraphModule:
    """Fill a prepared graph with learned quantizers, in place.

    Every layer that the calibration quantized gets its own, whatever the graph's quantizer had
    planned for it; quantizers that have seen no data go, so the graph computes what the calibrated
    network does. Grids of fewer than 8 bits are carried (see `carry_grid`).

    Args:
        model_or_result: The calibrated network that the graph was exported from.
        prepared: From ``prepare_pt2e``, of the network without its quantizers.

    Returns:
        ``prepared``.

    Raises:
        HostError: The graph lacks a layer of the calibrated network.
    """
    learned = quantized_layers(quantized_module(model_or_result))
    placed: dict[tuple[Node, CoreFakeQuantize], Node] = {}
    found: set[str] = set()
    for node in list(layer_nodes(prepared)):
        name = module_path(node)
        if name not in learned:
            continue
        found.add(name)
        layer = learned[name]
        weight = _observed(prepared, node.args[1])
        of_weight, of_input = layer.weight_fake_quant, layer.input_fake_quant
        if of_weight.quantizing and (weight, of_weight) not in placed:
            placed[weight, of_weight] = _insert(prepared, weight, of_weight, len(placed))
        node.update_arg(1, placed[weight, of_weight] if of_weight.quantizing else weight)
        source = _observed(prepared, node.args[0])
        readers = [node]
        if not is_plain(layer):  # it reads its input before it pads it
            source = _entering(prepared, source, name)
            readers = [
                each for each in prepared.graph.nodes if each.op == "call_function" and module_path(each) == name
            ]
        if of_input.quantizing and (source, of_input) not in placed:
            placed[source, of_input] = _insert(prepared, source, of_input, len(placed))
        _read(prepared, readers, source, placed[source, of_input] if of_input.quantizing else source)
    missing = sorted(set(learned) - found)
    if missing:
        raise HostError(
            f"The graph has no layer {missing[0]!r}, nor {len(missing) - 1} more of the calibrated network; export "
            "the network that was calibrated, with the same module names."
        )
    _drop_idle(prepared)
    return carry_grid(prepared)


def _observed(prepared: GraphModule, node: object) -> Node:
    """Return the tensor behind observers and fake quantizers."""
    while quantizer_at(prepared, node) is not None:
        node = cast(Node, node).args[0]
    return cast(Node, node)


def _entering(prepared: GraphModule, node: Node, name: str) -> Node:
    """Return the tensor that a module is given, from one that it makes of that."""
    while module_path(node) == name and node.args and isinstance(node.args[0], Node):
        node = _observed(prepared, node.args[0])
    return node


def _read(prepared: GraphModule, readers: Sequence[Node], source: Node, through: Node) -> None:
    """Let nodes that read ``source``, observed or not, read it through another node."""
    for reader in readers:
        for given in reader.all_input_nodes:
            if given is not through and _observed(prepared, given) is source:
                reader.replace_input_with(given, through)


def _insert(prepared: GraphModule, source: Node, quantizer: CoreFakeQuantize, number: int) -> Node:
    """Let a learned quantizer read ``source``."""
    kind = PerChannelLearnableFakeQuantize if quantizer.per_channel else LearnableFakeQuantize
    name = f"learned_quantizer_{number}"
    prepared.add_submodule(name, kind.adopt(quantizer))
    with prepared.graph.inserting_after(source):
        node = prepared.graph.call_module(name, (source,))
    copy_facts(source, node)
    return node


def _drop_idle(prepared: GraphModule) -> None:
    """Remove quantizers that have seen no data."""
    for node in list(prepared.graph.nodes):
        quantizer = quantizer_at(prepared, node)
        if quantizer is not None and _is_idle(quantizer):
            node.replace_all_uses_with(node.args[0])
            prepared.graph.erase_node(node)
    prepared.delete_all_unused_submodules()


def _is_idle(quantizer: nn.Module) -> bool:
    if isinstance(quantizer, CoreFakeQuantize):
        return quantizer.observing and not quantizer.activation_post_process.min_val.numel()
    return isinstance(quantizer, TorchaoObserver) and not quantizer.observer.min_val.numel()
