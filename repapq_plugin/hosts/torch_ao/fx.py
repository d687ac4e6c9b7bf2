"""torch.ao's graph mode: a calibrated network as a prepared graph, and a prepared graph as integer modules."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator

from torch import nn
from torch.ao.quantization import QConfigMapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.fx import Graph, GraphModule, Node, Tracer

from repapq_plugin.core.running import Batch, ForwardFn, call_model
from repapq_plugin.errors import HostError
from repapq_plugin.export.deploy import without_quantizers
from repapq_plugin.export.qdq_onnx import quantized_module
from repapq_plugin.hosts.hosted import quantized_layers
from repapq_plugin.hosts.torch_ao._compat import new_qconfig
from repapq_plugin.hosts.torch_ao.engines import (
    INTEGER_BIAS,
    checked_engine,
    engine_for,
    exact_engine,
    has_kernel,
    integer_engine,
    saturates,
    warn_of_saturation,
)
from repapq_plugin.hosts.torch_ao.grid import carry_grid, lay_biases_on_grid, quantizer_at, weight_quantizer_of
from repapq_plugin.hosts.torch_ao.outputs import STORED_BOUNDS, find_ranges, output_quantizer
from repapq_plugin.hosts.torch_ao.ready import Ready
from repapq_plugin.quantizers.layers import QuantizedLayer
from repapq_plugin.result import Calibrated

ENGINE = "repapq_engine"
"""Under which a prepared graph's ``meta`` says what it was prepared for."""


def prepare_learned(
    model_or_result: nn.Module | Calibrated,
    example_inputs: tuple[object, ...],
    data: Iterable[Batch],
    *,
    backend: str | None = None,
    forward_fn: ForwardFn | None = None,
) -> GraphModule:
    """Return what ``prepare_fx`` makes of a calibrated network, with the calibration's result in it.

    Layers and the tensors that they read carry the learned scales. torch.ao's integer layers also
    need a grid for their output where no quantized layer reads it directly (behind it comes a
    pooling, an addition, the network's end): those get 8 bits and a range from ``data``.

    Args:
        model_or_result: From `quantize_model`, or a module that holds its network; not changed.
        example_inputs: All arguments of its ``forward``, as a tuple.
        data: Batches for the ranges of those outputs.
        backend: Engine that it will be converted for; default: `exact_engine`. The graph rounds
            biases as the engine does.
        forward_fn: Runs one batch, as in `quantize_model`.

    Returns:
        The prepared graph, in evaluation mode, with nothing left to observe. It simulates what
        `convert_to_int8` makes of it.

    Raises:
        HostError: The network's Python cannot be traced to a graph, or holds no quantized layer.
        CalibrationError: ``data`` is empty.
    """
    model = quantized_module(model_or_result)
    quantized = quantized_layers(model)
    if not any(layer.weight_fake_quant.quantizing for layer in quantized.values()):
        raise HostError(f"{type(model).__name__} holds no quantized layer; quantize it with quantize_model first.")
    traced, origin = trace_layers(without_quantizers(model))
    learned = {name: quantized[source] for name, source in origin.items() if source in quantized}
    engine = checked_engine(backend or engine_for(learned.values()))
    mapping = QConfigMapping()
    for name, layer in learned.items():
        qconfig = new_qconfig(output_quantizer, Ready(layer.weight_fake_quant))
        mapping.set_module_name(name, qconfig if has_kernel(layer, engine) else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its age, and that the output quantizer is no partial of its own kind
        prepared = prepare_fx(traced, mapping, example_inputs)
    place_learned(prepared, learned)
    if engine in INTEGER_BIAS:
        lay_biases_on_grid(prepared)
    find_ranges(prepared, data, forward_fn or call_model)
    prepared.meta[ENGINE] = engine
    return prepared.eval()


def convert_to_int8(prepared: GraphModule, backend: str | None = None) -> GraphModule:
    """Convert a prepared graph to torch's integer modules, whatever its bits.

    Args:
        prepared: From `prepare_learned`, or from ``prepare_fx`` or ``prepare_qat_fx`` with our classes
            after calibration; not changed.
        backend: Engine to convert for; default: the one it was prepared for, or `exact_engine`. The
            result runs under it only: inside `integer_engine`, or with
            ``torch.backends.quantized.engine`` set.

    Returns:
        The integer network.

    Raises:
        ConfigError: torch has no such engine here.
    """
    engine = backend or prepared.meta.get(ENGINE) or exact_engine()
    carried = carry_grid(prepared, engine)
    if any(saturates(engine, activation, weight) for weight, activation in _bits(carried)):
        warn_of_saturation(engine)
    with integer_engine(engine), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return convert_fx(carried)


def _bits(prepared: GraphModule) -> Iterator[tuple[int, int]]:
    """Yield ``(weight_bits, activation_bits)`` of each layer."""
    for node in prepared.graph.nodes:
        source = quantizer_at(prepared, node.args[0]) if node.op == "call_module" and node.args else None
        weight = weight_quantizer_of(prepared.get_submodule(str(node.target))) if source is not None else None
        if source is not None and weight is not None:
            yield weight.num_bits, int(source.quant_max).bit_length()


class _LeafTracer(Tracer):
    """Keeps what torch.fx keeps whole, and everything that carries a weight of its own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m.__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)


def trace_layers(model: nn.Module) -> tuple[GraphModule, dict[str, str]]:
    """Return the graph of a network in which every call of a layer has a module of its own.

    torch.ao gives an integer layer one scale for its output, so a layer called several times (a head
    on several levels) stands in the graph several times, with one weight.

    Returns:
        The graph, and for each called module the path it had in ``model``.

    Raises:
        HostError: The Python of ``forward`` cannot be traced.
    """
    try:
        graph: Graph = _LeafTracer().trace(model)
    except Exception as error:  # whatever a forward does with a value that is not a tensor
        raise HostError(
            f"{type(model).__name__} cannot be traced by torch.fx ({type(error).__name__}: {error}). "
            "Quantize the part that maps tensors to tensors, or run the simulated network."
        ) from error
    traced = GraphModule(model, graph)
    origin: dict[str, str] = {}
    for node in traced.graph.nodes:
        if node.op != "call_module":
            continue
        source = str(node.target)
        calls = sum(name.split("__call")[0] == source for name in origin)
        if calls:
            node.target = f"{source}__call{calls}"
            traced.add_submodule(node.target, copy.copy(traced.get_submodule(source)))
        origin[str(node.target)] = source
    traced.recompile()
    return traced, origin


def place_learned(prepared: GraphModule, learned: dict[str, QuantizedLayer]) -> None:
    """Put learned input quantizers where the layers of a prepared graph read.

    An observed tensor that only layers with one and the same quantizer read takes it over; so does
    one that others read too, if it has 8 bits. Else the layers get theirs behind the observed tensor.
    """
    graph = prepared.graph
    layers = {
        node: learned[str(node.target)].input_fake_quant
        for node in graph.nodes
        if node.op == "call_module" and str(node.target) in learned
    }
    for node in list(graph.nodes):
        if quantizer_at(prepared, node) is None:
            continue
        wanted = list(dict.fromkeys(layers[user] for user in node.users if user in layers))
        wanted = [quantizer for quantizer in wanted if quantizer.quantizing]
        if not wanted:
            continue
        first = wanted[0]
        stored = (first.quant_min, first.quant_max) == STORED_BOUNDS
        if stored or (len(wanted) == 1 and all(user in layers for user in node.users)):
            prepared.set_submodule(str(node.target), copy.deepcopy(first))
            wanted = wanted[1:]
        for quantizer in wanted:
            _read_through(prepared, node, quantizer, [user for user in node.users if layers.get(user) is quantizer])
    prepared.recompile()


def _read_through(prepared: GraphModule, source: Node, quantizer: nn.Module, readers: list[Node]) -> None:
    """Let ``readers`` of ``source`` read it through ``quantizer``."""
    number = 0
    while hasattr(prepared, f"learned_input_{number}"):
        number += 1
    name = f"learned_input_{number}"
    prepared.add_submodule(name, copy.deepcopy(quantizer))
    with prepared.graph.inserting_after(source):
        through = prepared.graph.call_module(name, (source,))
    for reader in readers:
        reader.replace_input_with(source, through)
