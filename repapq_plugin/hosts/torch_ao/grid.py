"""Grids of fewer than 8 bits, carried exactly by torch.ao's 8-bit integers.

torch.ao's integer modules know 8 bits only and forget a smaller ``quant_min`` and ``quant_max``. So
weights are laid on their grid before the conversion, which leaves their codes as they are, and
behind each quantizer of an activation stands a clamp to the range of its grid. The clamp works on
integers: it is lowered to torch's quantized clamp.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from repapq_plugin.core.quant_primitives import CONTAINERS, grid_bounds
from repapq_plugin.hosts.torch_ao._compat import (
    MOVING,
    NORMED,
    GridModule,
    is_quantizer,
    layer_of,
    new_qconfig,
    norm_of,
    qconfig_of,
    set_qconfig,
    trained_weight_quantizer_of,
)
from repapq_plugin.hosts.torch_ao.engines import CLAMPS_CONTIGUOUS, INTEGER_BIAS, checked_engine, exact_engine
from repapq_plugin.hosts.torch_ao.ready import Ready
from repapq_plugin.observers import RangeObserver
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize

STORED = {torch.quint8: CONTAINERS[torch.uint8], torch.qint8: CONTAINERS[torch.int8]}
"""Smallest and largest code of torch.ao's types."""


def quantizer_at(graph: GraphModule, node: object) -> GridModule | None:
    """Return the observer or fake quantizer that ``node`` calls, if it calls one."""
    if not isinstance(node, Node) or node.op != "call_module":
        return None
    module = graph.get_submodule(str(node.target))
    return cast(GridModule, module) if is_quantizer(module) else None


def grid_range(quantizer: GridModule) -> tuple[float, float] | None:
    """Return the real range of a per-tensor grid, or ``None`` where its integers fill their type.

    The quantizer's ``dtype`` is quint8 or qint8.
    """
    low, high = int(quantizer.quant_min), int(quantizer.quant_max)
    if STORED.get(quantizer.dtype, (low, high)) == (low, high):
        return None
    return grid_bounds(*quantizer.calculate_qparams(), low, high)


def carry_grid(prepared: GraphModule, backend: str | None = None) -> GraphModule:
    """Make a prepared and calibrated graph survive the conversion to 8-bit integers, whatever its bits.

    Args:
        prepared: From ``prepare_fx`` or ``prepare_qat_fx`` with our observers or fake quantizers,
            after calibration; not changed.
        backend: Engine that it will be converted for; default: `exact_engine`.

    Returns:
        A copy for ``convert_fx``. Where it has fake quantizers it simulates the integer network; the
        weights are on their grid, and for an engine that adds biases as integers so are they.
    """
    engine = checked_engine(backend or exact_engine())
    carried = copy.deepcopy(prepared)
    absorb_norms(carried)
    for module in carried.modules():
        lay_on_grid(module)
    if engine in INTEGER_BIAS:
        lay_biases_on_grid(carried)
    _separate_grids(carried)
    for node in list(carried.graph.nodes):
        quantizer = quantizer_at(carried, node)
        bounds = grid_range(quantizer) if quantizer is not None else None
        if bounds is not None:
            _clamp_behind(carried.graph, node, bounds, contiguous=engine in CLAMPS_CONTIGUOUS)
    carried.recompile()
    return carried


def _separate_grids(graph: GraphModule) -> None:
    """Put a copy between an operator that only moves values and a quantizer of another grid than its input's.

    torch.ao lowers a pooling, a concatenation or an identity between two quantizers to work on integers, and
    takes for granted that both have one grid: the second one's scale would be lost.
    """
    modules = dict(graph.named_modules(remove_duplicate=False))
    for node in list(graph.graph.nodes):
        source = node.args[0] if quantizer_at(graph, node) is not None else None
        if not isinstance(source, Node) or not any(any(check(source, modules)) for check in MOVING):
            continue
        before = {str(x.target) for x in source.all_input_nodes if quantizer_at(graph, x) is not None}
        if before - {str(node.target)}:
            with graph.graph.inserting_after(source):
                node.update_arg(0, graph.graph.call_method("clone", (source,)))


def _clamp_behind(graph: Graph, node: Node, bounds: tuple[float, float], contiguous: bool) -> None:
    """Clamp what the quantizer at ``node`` gives; all its readers read the clamped tensor.

    The same quantizer follows each step again, since torch.ao lowers an operator to integers only
    between two equal ones.
    """
    readers = list(node.users)
    last = node
    steps: list[tuple[str, Callable[..., object] | str, tuple[float, ...]]] = [("call_function", torch.clamp, bounds)]
    if contiguous:
        steps.insert(0, ("call_method", "contiguous", ()))
    for kind, target, arguments in steps:
        with graph.inserting_after(last):
            last = graph.create_node(kind, target, (last, *arguments))
        with graph.inserting_after(last):
            last = graph.call_module(str(node.target), (last,))
    for reader in readers:
        reader.replace_input_with(node, last)


@torch.no_grad()
def absorb_norms(model: nn.Module) -> None:
    """Multiply the norms of torch.ao's trained modules into weight and bias, in place; what stays of them is 1 and 0.

    The weight is then what its quantizer quantizes.

    Args:
        model: In evaluation mode: running statistics are taken, as its forward pass takes them.
    """
    for module in model.modules():
        if isinstance(module, NORMED):
            norm, weight = norm_of(module), cast(nn.Parameter, module.weight)
            mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
            factor = norm.weight / torch.sqrt(variance + norm.eps)
            bias = 0 if module.bias is None else module.bias
            module.bias = nn.Parameter(norm.bias + (bias - mean) * factor)
            weight.copy_(weight * factor.reshape(-1, *[1] * (weight.dim() - 1)))
            norm.eps = 0.0
            for kept, value in ((norm.weight, 1), (norm.bias, 0), (mean, 0), (variance, 1)):
                kept.fill_(value)


def lay_biases_on_grid(prepared: GraphModule) -> None:
    """Round the biases of a graph as an engine that adds them as integers does, in place."""
    for node in prepared.graph.nodes:
        source = quantizer_at(prepared, node.args[0]) if node.op == "call_module" and node.args else None
        if source is not None:
            lay_bias_on_grid(prepared.get_submodule(str(node.target)), source)


@torch.no_grad()
def lay_bias_on_grid(module: nn.Module, source: GridModule) -> None:
    """Round a layer's bias, in place, to multiples of input scale times weight scale, in which its sums count.

    Args:
        module: A prepared layer; anything else is left alone.
        source: The quantizer of its input.
    """
    bias, quantizer = getattr(layer_of(module), "bias", None), weight_quantizer_of(module)
    if quantizer is not None and isinstance(bias, nn.Parameter):
        step = source.calculate_qparams()[0] * quantizer.scale
        bias.copy_(torch.round(bias / step) * step)


@torch.no_grad()
def weight_quantizer_of(module: nn.Module) -> LearnableFakeQuantize | None:
    """Return the quantizer of a layer's weight, ready and at rest; ``None`` without one of ours."""
    qconfig = qconfig_of(module)
    weight = getattr(layer_of(module), "weight", None)
    if qconfig is None or not isinstance(weight, nn.Parameter):
        return None
    quantizer = trained_weight_quantizer_of(module)
    if quantizer is None:
        quantizer = _finished(qconfig.weight(), weight)
    return cast(LearnableFakeQuantize, resting(quantizer)) if isinstance(quantizer, LearnableFakeQuantize) else None


@torch.no_grad()
def lay_on_grid(module: nn.Module) -> None:
    """Round a layer's weight to its grid in place, and pin the grid, so that a conversion finds it again.

    Modules without a weight, and weights that are quantized by a class not ours, are left alone.
    """
    quantizer = weight_quantizer_of(module)
    if quantizer is None:
        return
    layer, qconfig = layer_of(module), qconfig_of(module)
    weight = cast(nn.Parameter, layer.weight)
    weight.copy_(quantizer.quantize_dequantize(weight))
    if qconfig is not None and trained_weight_quantizer_of(module) is None:
        pinned = new_qconfig(qconfig.activation, Ready(quantizer))
        for each in {module, layer}:
            set_qconfig(each, pinned)


def _finished(quantizer: nn.Module, weight: Tensor) -> nn.Module:
    """Let one of our observers or fake quantizers see ``weight``, and return it at rest."""
    quantizer.to(weight.device)
    if isinstance(quantizer, RangeObserver | LearnableFakeQuantize):
        quantizer(weight)
    return resting(quantizer)


def resting(quantizer: nn.Module) -> nn.Module:
    """Return a fake quantizer that observes no longer, for one of our fake quantizers or observers.

    Anything else comes back as it is.
    """
    if isinstance(quantizer, LearnableFakeQuantize):
        quantizer.enable_observer(False)
    if not isinstance(quantizer, RangeObserver):
        return quantizer
    fixed = LearnableFakeQuantize(
        observer=type(quantizer),
        dtype=quantizer.dtype,
        qscheme=quantizer.qscheme,
        quant_min=quantizer.quant_min,
        quant_max=quantizer.quant_max,
        ch_axis=quantizer.ch_axis,
    ).to(quantizer.min_val.device)
    fixed.enable_observer(False)
    fixed.set_qparams(*quantizer.calculate_qparams())
    return fixed
