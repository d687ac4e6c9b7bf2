"""Which of NNCF's operations are those of layers that stay float, wherever their weights are used."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

from repapq_plugin.core.copies import own_batch
from repapq_plugin.core.running import Batch
from repapq_plugin.hosts.nncf._compat import (
    INPUT_NODE,
    FunctionHookMode,
    NNCFGraph,
    NNCFNode,
    build_nncf_graph,
    get_hook_storage,
    wrap_model,
)
from repapq_plugin.hosts.nncf.data import forward
from repapq_plugin.hosts.nncf.running import watch_calls
from repapq_plugin.quantizers.layers import QUANTIZABLE

WEIGHT = ".weight"


@dataclass(frozen=True)
class Operations:
    """NNCF's names of operations.

    Args:
        of_layers: Those that read the weight of a layer.
        left_float: Those of layers that are not to be quantized.
    """

    of_layers: list[str]
    left_float: list[str]


def find_operations(model: nn.Module, item: Batch, planned: Collection[str]) -> Operations:
    """Return NNCF's names for the operations of layers.

    A layer that is not planned is left out with all that its own forward does, and with every other use of its weight:
    by a function, also behind functions that change the weight.

    Args:
        model: The float network; not changed.
        item: What it is run on.
        planned: Module paths of the layers that are to be quantized.
    """
    wrapped: nn.Module = wrap_model(copy.deepcopy(model))
    graph: NNCFGraph = build_nncf_graph(wrapped, own_batch(item))
    layers = {name: m for name, m in wrapped.named_modules() if isinstance(m, QUANTIZABLE)}
    floating = [name for name in layers if name not in planned]
    held = {id(layers[name].weight) for name in layers if name in planned}
    found = dict.fromkeys(_inside(wrapped, floating, item))
    readers = {
        node.node_name.removesuffix(WEIGHT): list(_readers(graph, node))
        for node in graph.get_all_nodes()
        if node.node_name.endswith(WEIGHT)
    }
    for name in floating:
        if id(layers[name].weight) not in held:
            found |= dict.fromkeys(readers.get(name, ()))
    known = {node.node_name for node in graph.get_all_nodes()}
    names = [name for path, reading in readers.items() if path in layers for name in reading]
    return Operations(names, [name for name in found if name in known])


def _inside(model: nn.Module, names: Collection[str], item: Batch) -> Iterator[str]:
    """Yield the operations that modules carry out when they are called."""

    def run() -> object:
        # A model without hooks runs without NNCF's mode, which counts operations.
        with FunctionHookMode(model=model, hook_storage=get_hook_storage(model)):
            return forward(model, own_batch(item))

    calls = watch_calls(model, names, run) if names else {}
    for call in (call for of_one in calls.values() for call in of_one):
        for operation, count in call.after.items():
            yield from (f"{operation}/{number}" for number in range(call.before.get(operation, 0), count))


def _readers(graph: NNCFGraph, weight: NNCFNode) -> Iterator[str]:
    """Yield the operations that bring a weight, or what is made of it alone, together with something else."""
    on_data = _on_data(graph)
    waiting, seen = list(graph.get_next_nodes(weight)), set[str]()
    while waiting:
        node = waiting.pop(0)
        if node.node_name in seen:
            continue
        seen.add(node.node_name)
        if node.node_name in on_data:
            yield node.node_name
        else:
            waiting += graph.get_next_nodes(node)


def _on_data(graph: NNCFGraph) -> set[str]:
    """Return the operations that depend on the network's input."""
    waiting = [node for node in graph.get_all_nodes() if node.node_type == INPUT_NODE]
    found: set[str] = set()
    while waiting:
        for node in graph.get_next_nodes(waiting.pop()):
            if node.node_name not in found:
                found.add(node.node_name)
                waiting.append(node)
    return found
