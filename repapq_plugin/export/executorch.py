"""ExecuTorch files: a quantized program whose operators XNNPACK takes, layers with integer weights in its integers."""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from repapq_plugin.core.files import write_atomically
from repapq_plugin.core.installs import EXECUTORCH
from repapq_plugin.errors import ExportError
from repapq_plugin.export._xnnpack import flatc_found, xnnpack_layers
from repapq_plugin.export.blame import explained
from repapq_plugin.export.calls import Example
from repapq_plugin.export.program import MobileSummary, constant, program_of, with_weights
from repapq_plugin.export.program_grids import layer_calls

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExecuTorchSummary(MobileSummary):
    """What was written, read back from the graphs that were handed to XNNPACK; see also `MobileSummary`.

    Args:
        outside: Operators that no partition of XNNPACK has taken, with their number.
        partitions: Number of XNNPACK's partitions.
    """

    outside: Mapping[str, int]
    partitions: int


def export_executorch(
    source: object,
    example: Example,
    path: str | os.PathLike[str],
    *,
    batches: Sequence[Example] | None = None,
) -> ExecuTorchSummary:
    """Write a quantized model for ExecuTorch, its integer layers for XNNPACK.

    Args:
        source: The quantized module, anything that holds it as ``.model``, a `QuantizedProgram`, or the path of a
            ``.pt2`` file with one.
        example: See `export_onnx`; not read where ``source`` is a program. Its shapes are those of the file.
        path: File to write; replaced atomically.
        batches: See `quantized_program`; not read where ``source`` is a program.

    Raises:
        ExportError: executorch is missing, the model cannot be exported or lowered, XNNPACK computes another number of
            layers in integers than it should, or the file cannot be written.
    """
    require_executorch()
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = program_of(source, example, batches)
    lowered_from = with_weights(program, _float_weight(set(program.float_outputs)))
    with warnings.catch_warnings(), flatc_found(), torch.no_grad():
        warnings.simplefilter("ignore")
        with explained("ExecuTorch cannot take the network", "Export the part of it that maps tensors to tensors."):
            lowered = to_edge_transform_and_lower(lowered_from.exported(), partitioner=[XnnpackPartitioner()])
            graph = cast(GraphModule, lowered.exported_program().graph_module)
            found, partitions = xnnpack_layers(graph)
            data = cast(bytes, lowered.to_executorch().buffer)
    integer = sum(layer.computes_integers for layer in found)
    expected = len(program.layers) - len(program.float_outputs)
    if integer != expected:
        raise ExportError(
            f"XNNPACK computes {integer} layers in 8-bit integers where {expected} should be; it was handed {found}."
        )
    notes = program.float_outputs_note("XNNPACK")
    for note in notes:
        logger.info(note)
    write_atomically(Path(path), data)
    return ExecuTorchSummary(
        path=Path(path),
        size_bytes=len(data),
        layers=len(program.layers),
        integer_layers=integer,
        float_layers=program.float_outputs,
        outside=_outside(graph),
        partitions=partitions,
        notes=notes,
    )


def _float_weight(names: set[str]) -> Callable[[GraphModule, Node, Tensor], Node | None]:
    """Return what makes float weights of layers of these names: XNNPACK takes integer ones for integer results only."""

    def make(copied: GraphModule, node: Node, weight: Tensor) -> Node | None:
        layer = next(layer for layer in node.users)
        name = layer_calls(copied)[layer]
        return constant(copied, f"float_weight_{node.name}", weight) if name in names else None

    return make


def _outside(graph: GraphModule) -> dict[str, int]:
    """Return the operators of a lowered graph that no partition has taken, with their number."""
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return dict(Counter(name for name in calls if "executorch_call_delegate" not in name and "getitem" not in name))


def require_executorch() -> None:
    """Make sure that executorch is installed.

    Raises:
        ExportError: It is not; the message says what to install.
    """
    if find_spec("executorch") is None:
        raise ExportError(f"This needs the executorch package: {EXECUTORCH}")
