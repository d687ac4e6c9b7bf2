"""A quantized network as a ``torch.export`` graph in torch's own quantize and dequantize operators.

Compilers for phones read these: ``quantized_decomposed.quantize_per_tensor``, its inverse, and
``dequantize_per_channel`` on int8 weights. Activations are written as int8 whatever grid a result has: uint8 codes are
shifted by 128, which is the same grid.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_fx as quantize_fx  # defines the operators
from torch.fx import GraphModule, Node

from repapq_plugin.core.files import atomically, unwritable
from repapq_plugin.core.modules import become
from repapq_plugin.core.quant_primitives import CONTAINERS
from repapq_plugin.errors import ExportError
from repapq_plugin.export.blame import Running, explained
from repapq_plugin.export.calls import Call, Example
from repapq_plugin.export.deploy import DeployedLayer, DeployedSkip, deployable
from repapq_plugin.export.program_grids import (
    Grid,
    dequantize_for_each,
    float_outputs,
    join_clamps,
    keep_pooled,
    layer_calls,
    merge_grids,
    read_instead,
    round_outputs,
    round_results,
    round_sources,
    share_roundings,
)
from repapq_plugin.export.qdq_onnx import quantized_module
from repapq_plugin.quantizers.layers import output_channels_axis, take_role

operators = torch.ops.quantized_decomposed

NARROW = (-127, 127)
"""Codes that weights keep to."""


@dataclass(frozen=True)
class ProgramSummary:
    """What was written.

    Args:
        path: The ``.pt2`` file.
        size_bytes: Its size.
    """

    path: Path
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class MobileSummary:
    """What was written for a runtime on phones, read back from it.

    Args:
        path: The file.
        size_bytes: Its size.
        layers: Calls of layers that read integers and have integer weights.
        integer_layers: Those that the runtime computes from int8 to int8.
        float_layers: Paths of the others: it computes them in floating point, on the very grids, since nothing rounds
            what they return and its integer kernels write integers only.
        notes: What is worth knowing about the file, in sentences.
    """

    path: Path
    size_bytes: int
    layers: int
    integer_layers: int
    float_layers: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuantizedProgram:
    """A network as a graph in torch's quantize and dequantize operators.

    Args:
        graph: Computes what the deployed network does, for inputs of the example's shapes.
        inputs: The example's tensors, in the order of the graph's inputs.
        layers: Module paths of layers that read integers and have integer weights, one entry for each call.
        float_outputs: Those of them whose output nothing rounds: a runtime whose integer kernels write integers
            computes them in floating point.
    """

    graph: GraphModule
    inputs: tuple[Tensor, ...]
    layers: tuple[str, ...]
    float_outputs: tuple[str, ...]

    def float_outputs_note(self, runtime: str) -> tuple[str, ...]:
        """Return what is worth knowing of `float_outputs` on a runtime whose integer kernels write integers."""
        if not self.float_outputs:
            return ()
        return (
            f"{runtime}'s integer kernels write integers, and nothing rounds what these layers return, so it computes "
            f"them in floating point: {', '.join(self.float_outputs)}. Give batches=... to round it to 8 bits.",
        )

    def exported(self) -> torch.export.ExportedProgram:
        """Return the graph as ``torch.export`` gives one."""
        with torch.no_grad():
            return torch.export.export(self.graph, self.inputs)

    def save(self, path: str | os.PathLike[str]) -> ProgramSummary:
        """Write a ``.pt2`` file, which `load_program` reads where neither the toolbox nor the network's code is.

        Raises:
            ExportError: The file cannot be written.
        """
        target = Path(path)
        try:
            with atomically(target) as partial, partial.open("wb") as file:
                torch.export.save(self.exported(), file)
        except OSError as error:
            raise unwritable(target, error) from error
        return ProgramSummary(target, target.stat().st_size)


class _ProgramLayer(DeployedLayer):
    """The role of a `DeployedLayer` that calls torch's quantize and dequantize operators."""

    input_grid: Grid
    program_zeros: Tensor
    one_scale: float

    def _quantized(self, x: Tensor) -> Tensor:
        return self.input_grid.rounded(x)

    def dequantized_weight(self) -> Tensor:
        """Return the float weight that the integer codes stand for."""
        if self.weight_scale.dim():
            scale, zeros, axis = self.weight_scale, self.program_zeros, output_channels_axis(self)
            weight = operators.dequantize_per_channel(self.weight_codes, scale, zeros, axis, *NARROW, torch.int8)
        else:
            weight = operators.dequantize_per_tensor(self.weight_codes, self.one_scale, 0, *NARROW, torch.int8)
        return cast(Tensor, weight)


class _ProgramSkip(DeployedSkip):
    """The role of a `DeployedSkip` that calls them."""

    input_grid: Grid

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x``, float, any shape."""
        return self.input_grid.rounded(x)


def _grid_of(reader: DeployedLayer | DeployedSkip) -> Grid:
    """Return the grid of a reader's input, with int8 codes."""
    low, _ = CONTAINERS[reader.input_zero_point.dtype]
    shift = CONTAINERS[torch.int8][0] - low
    return Grid(float(reader.input_scale), int(reader.input_zero_point) + shift, reader.clamp_range)


def quantized_program(
    model_or_result: object,
    example: Example,
    *,
    batches: Sequence[Example] | None = None,
    round_biases: bool = True,
) -> QuantizedProgram:
    """Write a quantized model as a ``torch.export`` graph on the very grids that it was calibrated to.

    Rounding is repeated in front of operators that only move values (concatenation, maximum pooling, ...), which
    changes nothing, so that these run in integers too.

    Args:
        model_or_result: The quantized module, or anything that holds it as ``.model``.
        example: See `export_onnx`; the graph is for its shapes alone.
        batches: Inputs like the example. Where they are given, outputs of layers that nothing rounds get an 8-bit grid
            over the range met, so that integer kernels can write them, and what layers read on several grids of 8 bits
            gets one. This rounds more than the calibration did.
        round_biases: Round biases of layers that compute in integers to multiples of input scale times weight scale, as
            the runtimes do when they read a float one. The graph then computes what they do; without it, what the
            calibrated network does.

    Raises:
        ExportError: A layer is not ready for export, or ``torch.export`` cannot follow the model.
    """
    deployed = deployable(quantized_module(model_or_result)).requires_grad_(False)
    call = Call.of(example, deployed)
    for module in list(deployed.modules()):
        if isinstance(module, DeployedLayer):
            layer = take_role(module, _ProgramLayer)
            if layer.quantizes_input:
                layer.input_grid = _grid_of(layer)
            if layer.quantizes_weight and layer.weight_scale.dim():
                layer.register_buffer("program_zeros", torch.zeros(len(layer.weight_scale), dtype=torch.int64))
            elif layer.quantizes_weight:
                layer.one_scale = float(layer.weight_scale)
        elif isinstance(module, DeployedSkip):
            become(module, _ProgramSkip).input_grid = _grid_of(module)
    with call.flattened(deployed) as inputs, Running(deployed) as running, torch.no_grad():
        remedy = "Export the part of the model that maps tensors to tensors."
        with explained("torch.export cannot follow the model", remedy, lambda _: running.path):
            graph = _unlifted(torch.export.export(_Flat(deployed), inputs, strict=False))
    share_roundings(graph)
    keep_pooled(graph)
    round_sources(graph)
    if batches is not None:
        merge_grids(graph)
        round_sources(graph)
        round_outputs(graph, [tuple(Call.of(batch, deployed).tensors) for batch in batches])
        round_sources(graph)
    round_results(graph)
    join_clamps(graph)
    if round_biases:
        _round_biases(graph)
    dequantize_for_each(graph)
    # Copies: an example may be a view of far more, all of which would be saved.
    return _described(graph, tuple(x.detach().clone() for x in inputs))


def load_program(path: str | os.PathLike[str]) -> QuantizedProgram:
    """Read what `QuantizedProgram.save` wrote.

    Raises:
        ExportError: There is no such file, or it holds something else.
    """
    source = Path(path)
    if not source.is_file():
        raise ExportError(f"There is no file {source}; write it with quantized_program(...).save first.")
    with explained(f"{source} cannot be read as a program", "Give a file that quantized_program(...).save wrote."):
        exported = torch.export.load(source)
    inputs = tuple(x for x in exported.example_inputs[0] if isinstance(x, Tensor)) if exported.example_inputs else ()
    return _described(_unlifted(exported), inputs)


def program_of(source: object, example: Example, batches: Sequence[Example] | None) -> QuantizedProgram:
    """Return a program as it is, from its file, or made of a quantized module or result."""
    if isinstance(source, QuantizedProgram):
        return source
    if isinstance(source, str | os.PathLike):
        return load_program(source)
    return quantized_program(source, example, batches=batches)


def with_weights(
    program: QuantizedProgram, make: Callable[[GraphModule, Node, Tensor], Node | None]
) -> QuantizedProgram:
    """Return a copy of a program with other nodes in place of those that make float weights of int8 codes.

    Args:
        program: Not changed.
        make: Gets the graph, the operator that makes a weight, and that weight as float; inserts a node behind that
            operator and returns it, or ``None`` to leave it.
    """
    graph = copy.deepcopy(program.graph)
    graph.training = False
    for node in {cast(Node, layer.args[1]): None for layer in layer_calls(graph)}:
        codes, scale = _attribute(graph, node.args[0]), node.args[1]
        if isinstance(scale, Node):
            values = _attribute(graph, scale)
            shape = [1] * codes.dim()
            shape[cast(int, node.args[3])] = -1
            weight = codes.to(values.dtype) * values.reshape(shape)
        else:
            weight = codes.to(torch.float32) * cast(float, scale)
        with graph.graph.inserting_after(node):
            made = make(graph, node, weight)
        if made is not None:
            read_instead(node, made)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return replace(program, graph=graph)


def _round_biases(graph: GraphModule) -> None:
    """Round the biases of layers whose input, weight and output are rounded, in place."""
    unrounded = float_outputs(graph)
    for number, layer in enumerate(layer_calls(graph)):
        bias = layer.args[2] if len(layer.args) > 2 else None
        if layer in unrounded or bias is None:
            continue
        source, weight = cast(Node, layer.args[0]), cast(Node, layer.args[1])
        of_weight = weight.args[1]
        step = _attribute(graph, of_weight) if isinstance(of_weight, Node) else torch.tensor(of_weight)
        unit = cast(float, source.args[1]) * step.double()
        value = _attribute(graph, bias)
        rounded = (torch.round(value.double() / unit) * unit).to(value.dtype)
        with graph.graph.inserting_before(layer):
            layer.update_arg(2, constant(graph, f"rounded_bias_{number}", rounded))
    graph.recompile()


def constant(graph: GraphModule, name: str, value: Tensor) -> Node:
    """Keep a tensor in a graph as a buffer, and return a node that reads it."""
    graph.register_buffer(name, value)
    return graph.graph.get_attr(name)


def _attribute(graph: GraphModule, node: object) -> Tensor:
    path, _, name = str(cast(Node, node).target).rpartition(".")
    return cast(Tensor, getattr(graph.get_submodule(path), name))


def _unlifted(exported: torch.export.ExportedProgram) -> GraphModule:
    """Return a graph that holds its weights, without the checks of its inputs."""
    module = exported.module()
    for node in list(module.graph.nodes):
        if node.op == "call_module" and str(node.target).startswith("_guards"):
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _described(graph: GraphModule, inputs: tuple[Tensor, ...]) -> QuantizedProgram:
    unrounded = float_outputs(graph)
    return QuantizedProgram(graph, inputs, tuple(layer_calls(graph).values()), tuple(unrounded.values()))


class _Flat(nn.Module):
    """Calls a network with its tensors by position, whatever else its forward takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> object:
        """Run the network."""
        return self.model(*inputs)
