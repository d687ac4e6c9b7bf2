"""Where NNCF put its quantizers: which one rounds which layer's weight, and which layers read which activation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os.path import commonprefix

import torch
from torch import Tensor, nn

from repapq_plugin.core.hooks import Hooks
from repapq_plugin.hosts.nncf._compat import (
    QUANTIZE_NODES,
    AsymmetricQuantizer,
    BaseQuantizer,
    NNCFGraph,
    SymmetricQuantizer,
    current_mode,
    decode_hook_name,
    get_hook_storage,
    replace_hook,
)
from repapq_plugin.quantizers.layers import QUANTIZABLE


@dataclass(frozen=True)
class PlacedWeight:
    """A layer whose weight is quantized.

    Args:
        module: The layer.
        quantizer: The quantizer of its weight.
        operations: NNCF's names of the operations that read the weight, one for each call.
    """

    module: nn.Module
    quantizer: BaseQuantizer
    operations: tuple[str, ...]


@dataclass(frozen=True)
class PlacedActivation:
    """A quantizer of an activation.

    Args:
        quantizer: The quantizer; it may stand in several places (NNCF's unified scales).
        hooks: NNCF's names of those places.
        inside: Path of the innermost module that holds all of them.
        readers: Paths of the quantized layers that read what it returns, through no other quantizer.
    """

    quantizer: BaseQuantizer
    hooks: tuple[str, ...]
    inside: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Placement:
    """All quantizers of a model: those of weights by module path, and those of activations."""

    weights: dict[str, PlacedWeight] = field(default_factory=dict)
    activations: list[PlacedActivation] = field(default_factory=list)

    @property
    def quantizers(self) -> list[BaseQuantizer]:
        """Every quantizer once, whatever shares it."""
        of_weights = [placed.quantizer for placed in self.weights.values()]
        return list(dict.fromkeys(of_weights + [placed.quantizer for placed in self.activations]))


def find_placement(model: nn.Module, graph: NNCFGraph, run: Callable[[], object]) -> Placement:
    """Find all quantizers of a model that `nncf.quantize` returned.

    NNCF gives a weight that is read by several operations, because its layer is called several times or shares it
    with another, a quantizer for each; they become one, since the weight is one.

    Args:
        model: The model.
        graph: NNCF's graph of it, quantizers included.
        run: Makes one forward pass.
    """
    hooks, owners, weights_of = _watch(model, run)
    paths = {module: name for name, module in model.named_modules()}
    placement = Placement()
    first_of: dict[int, BaseQuantizer] = {}
    for layer, quantizers in weights_of.items():
        first = first_of.setdefault(id(layer.weight), quantizers[0])
        operations = []
        for quantizer in quantizers:
            for hook in hooks[quantizer]:
                operations.append(decode_hook_name(hook)[1])
                if quantizer is not first:
                    replace_hook(model, hook, first)
        placement.weights[paths[layer]] = PlacedWeight(layer, first, tuple(operations))
    layer_of = {operation: name for name, placed in placement.weights.items() for operation in placed.operations}
    for_weights = {id(quantizer) for quantizers in weights_of.values() for quantizer in quantizers}
    for quantizer, places in hooks.items():
        if id(quantizer) not in for_weights and quantizer in owners:
            inside = _common([paths[owner] for owner in owners[quantizer]])
            readers = _readers(graph, places, layer_of)
            placement.activations.append(PlacedActivation(quantizer, tuple(places), inside, readers))
    return placement


def _watch(
    model: nn.Module, run: Callable[[], object]
) -> tuple[dict[BaseQuantizer, list[str]], dict[BaseQuantizer, list[nn.Module]], dict[nn.Module, list[BaseQuantizer]]]:
    """Return every quantizer's hooks, the modules in which it runs, and the quantizers of every layer's weight."""
    hooks: dict[BaseQuantizer, list[str]] = {}
    for name, hook in get_hook_storage(model).named_hooks(remove_duplicate=False):
        if isinstance(hook, SymmetricQuantizer | AsymmetricQuantizer):
            hooks.setdefault(hook, []).append(name)
    owners: dict[BaseQuantizer, list[nn.Module]] = {}
    weights: dict[nn.Module, list[BaseQuantizer]] = {}

    def before(quantizer: nn.Module, args: tuple[Tensor, ...]) -> None:
        mode = current_mode(model)
        if mode is None:
            return
        owner = mode.module_call_stack[-2]
        if isinstance(owner, QUANTIZABLE) and args[0] is owner.weight:
            found = weights.setdefault(owner, [])
            if quantizer not in found:
                found.append(quantizer)
        elif owner not in owners.setdefault(quantizer, []):
            owners[quantizer].append(owner)

    with Hooks() as watching, torch.no_grad():
        for quantizer in hooks:
            watching.before(quantizer, before)
        run()
    return hooks, owners, weights


def _common(paths: list[str]) -> str:
    """Return the innermost module path around all ``paths``."""
    return ".".join(commonprefix([path.split(".") for path in paths]))


def _readers(graph: NNCFGraph, hooks: list[str], layer_of: Mapping[str, str]) -> tuple[str, ...]:
    """Return the layers that read what a quantizer at ``hooks`` returns, found along NNCF's graph."""
    found: list[str] = []
    seen: set[str] = set()
    waiting = []
    for hook in hooks:
        kind, operation, _ = decode_hook_name(hook)
        node = graph.get_node_by_name(operation)
        if kind == "pre_hooks":
            waiting.append(node)
        else:
            for quantize in graph.get_next_nodes(node):
                waiting += graph.get_next_nodes(quantize)
    while waiting:
        node = waiting.pop(0)
        if node.node_name in seen:
            continue
        seen.add(node.node_name)
        if node.node_name in layer_of:
            found.append(layer_of[node.node_name])
        elif node.node_type not in QUANTIZE_NODES:
            waiting += graph.get_next_nodes(node)
    return tuple(dict.fromkeys(found))
