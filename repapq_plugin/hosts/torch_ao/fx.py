"""torch.ao's graph mode: a calibrated network as a prepared graph, and a prepared graph as integer modules."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.ao.quantization import QConfigMapping
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.fx import Graph, GraphModule, Node, Tracer
from torch.nn import functional

from repapq_plugin.core.copies import own_batch
from repapq_plugin.core.modules import own_registries
from repapq_plugin.core.running import Batch, ForwardFn, call_model
from repapq_plugin.errors import HostError
from repapq_plugin.export.qdq_onnx import quantized_module
from repapq_plugin.hosts.hosted import keep_root_hooks, quantized_layers
from repapq_plugin.hosts.torch_ao._compat import new_qconfig
from repapq_plugin.hosts.torch_ao.carried import (
    Padding,
    plain_layer_of,
    put_back,
    reason_to_simulate,
    simulated_layers,
)
from repapq_plugin.hosts.torch_ao.engines import (
    INTEGER_BIAS,
    checked_engine,
    engine_for,
    exact_engine,
    integer_engine,
    refuse_signed_inputs,
    saturates,
    warn_of_saturation,
)
from repapq_plugin.hosts.torch_ao.grid import carry_grid, lay_biases_on_grid, quantizer_at, weight_quantizer_of
from repapq_plugin.hosts.torch_ao.outputs import STORED_BOUNDS, find_ranges, output_quantizer
from repapq_plugin.hosts.torch_ao.ready import Ready
from repapq_plugin.quantizers.layers import QUANTIZABLE, QuantizedLayer
from repapq_plugin.quantizers.own_forward import calls_of
from repapq_plugin.result import Calibrated

ENGINE = "repapq_engine"
"""Under which a prepared graph's ``meta`` says what it was prepared for."""

SIMULATED = "repapq_simulated"
"""Under which it says for which layers no integer module stands, and why: reasons by module path."""

INSIDE = "it is inside a module that torch.ao takes as a whole"

logger = logging.getLogger(__name__)


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
    refuse_signed_inputs(quantized)
    if not any(layer.weight_fake_quant.quantizing for layer in quantized.values()):
        raise HostError(f"{type(model).__name__} holds no quantized layer; quantize it with quantize_model first.")
    traced, origin = trace_layers(copy.deepcopy(model).eval())
    learned = {name: quantized[source] for name, source in origin.items() if source in quantized}
    engine = checked_engine(backend or engine_for(learned.values()))
    with torch.no_grad():
        calls = calls_of(list(set(learned.values())), lambda: model(*own_batch(example_inputs)))
    simulated = {name: INSIDE for name in quantized if name not in origin.values()}
    reasons = {name: reason_to_simulate(layer, calls.get(layer, []), engine) for name, layer in learned.items()}
    simulated |= {origin[name]: reason for name, reason in reasons.items() if reason}
    learned = {name: layer for name, layer in learned.items() if not reasons[name]}
    mapping = QConfigMapping()
    for name, layer in learned.items():
        _put_plain(traced, name, layer)
        mapping.set_module_name(name, new_qconfig(output_quantizer, Ready(layer.weight_fake_quant)))
    traced.recompile()
    whole = PrepareCustomConfig().set_non_traceable_module_names(
        [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its age, and that the output quantizer is no partial of its own kind
        try:
            prepared = prepare_fx(traced, mapping, example_inputs, whole)
        except Exception as error:  # whatever torch.ao did not foresee in a graph
            raise HostError(
                f"torch.ao cannot prepare the graph of {type(model).__name__} ({type(error).__name__}: {error}). "
                "Quantize the part that it can, or run the simulated network."
            ) from error
    place_learned(prepared, learned)
    if engine in INTEGER_BIAS:
        lay_biases_on_grid(prepared)
    find_ranges(prepared, data, forward_fn or call_model)
    prepared.meta[ENGINE], prepared.meta[SIMULATED] = engine, simulated
    if simulated:
        logger.warning("%s", note_of(simulated))
    keep_root_hooks(model, prepared)
    return prepared.eval()


def note_of(simulated: Mapping[str, str]) -> str:
    """Return what is to be said of layers that no integer module stands for."""
    named = ", ".join(f"{name!r} ({reason})" for name, reason in simulated.items())
    return f"torch.ao's integer modules do not carry {named}; there the simulated layers run."


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
        simulated = simulated_layers(carried)
        converted = convert_fx(carried)
    put_back(converted, simulated)
    keep_root_hooks(prepared, converted)
    return converted


def _bits(prepared: GraphModule) -> Iterator[tuple[int, int]]:
    """Yield ``(weight_bits, activation_bits)`` of each layer."""
    for node in prepared.graph.nodes:
        source = quantizer_at(prepared, node.args[0]) if node.op == "call_module" and node.args else None
        weight = weight_quantizer_of(prepared.get_submodule(str(node.target))) if source is not None else None
        if source is not None and weight is not None:
            yield weight.num_bits, int(source.quant_max).bit_length()


class _LeafTracer(Tracer):
    """Keeps what torch.fx keeps whole, and every layer, also one with a forward of its own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = m.__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)
        return whole or isinstance(m, QUANTIZABLE)


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
    for node in list(traced.graph.nodes):
        if node.op == "call_method" and node.target == "relu" or node.target is torch.relu:
            node.op, node.target = "call_function", functional.relu  # of three spellings the one that is fused
        if node.op != "call_module":
            continue
        if not node.args and list(node.kwargs) == ["input"]:  # torch.ao reads arguments by position
            node.args, node.kwargs = (node.kwargs["input"],), {}
        if type(traced.get_submodule(str(node.target))) is nn.Identity:  # a folded norm would part a layer and its ReLU
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
            continue
        source = str(node.target)
        calls = list(origin.values()).count(source)
        if calls:
            node.target = f"{source}__call{calls}"
            traced.add_submodule(node.target, own_registries(copy.copy(traced.get_submodule(source))))
        origin[str(node.target)] = source
    traced.recompile()
    return traced, origin


def _put_plain(traced: GraphModule, name: str, layer: QuantizedLayer) -> None:
    """Let torch's own layer stand for a calibrated one, behind its padding, and be called with a tensor alone."""
    plain, padding = plain_layer_of(layer)
    traced.set_submodule(name, plain)
    for node in [node for node in traced.graph.nodes if node.op == "call_module" and node.target == name]:
        x = next(iter((*node.args, *node.kwargs.values())))
        if padding is not None:
            traced.add_submodule(f"{name}__padding", padding)
            with traced.graph.inserting_before(node):
                x = traced.graph.call_module(f"{name}__padding", (x,))
        node.args, node.kwargs = (x,), {}


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
    for node, quantizer in list(layers.items()):
        padding = _padding_before(prepared, node)
        if padding is not None:  # it hands on what it reads
            layers[padding] = quantizer
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


def _padding_before(prepared: GraphModule, layer: Node) -> Node | None:
    """Return the node that pads what a layer reads, if one does."""
    observed = layer.args[0]
    source = observed.args[0] if isinstance(observed, Node) and quantizer_at(prepared, observed) is not None else None
    if not isinstance(source, Node) or source.op != "call_module":
        return None
    return source if isinstance(prepared.get_submodule(str(source.target)), Padding) else None


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
