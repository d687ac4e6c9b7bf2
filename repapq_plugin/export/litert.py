"""LiteRT files: a quantized program through litert-torch, on the very grids of the calibration."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from repapq_plugin.core.files import write_atomically
from repapq_plugin.core.installs import LITERT_TORCH
from repapq_plugin.errors import ExportError
from repapq_plugin.export.blame import explained
from repapq_plugin.export.calls import Example
from repapq_plugin.export.program import MobileSummary, QuantizedProgram, constant, program_of, with_weights
from repapq_plugin.export.program_grids import operators, roundings

logger = logging.getLogger(__name__)

LAYERS = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED")
"""LiteRT's operators that have weights."""


@dataclass(frozen=True, kw_only=True)
class LiteRTSummary(MobileSummary):
    """What was written, read back from the file; see also `MobileSummary`.

    Args:
        integer_inputs: Whether the file's inputs are int8 on the first layer's grid; `LiteRTNetwork` rounds to it.
        integer_outputs: Whether its outputs are int8.
    """

    integer_inputs: bool
    integer_outputs: bool


def export_litert(
    source: object,
    example: Example,
    path: str | os.PathLike[str],
    *,
    batches: Sequence[Example] | None = None,
) -> LiteRTSummary:
    """Write a quantized model for LiteRT.

    Args:
        source: The quantized module, anything that holds it as ``.model``, a `QuantizedProgram`, or the path of a
            ``.pt2`` file with one.
        example: See `export_onnx`; not read where ``source`` is a program. Its shapes are those of the file.
        path: File to write; replaced atomically.
        batches: See `quantized_program`; not read where ``source`` is a program.

    Raises:
        ExportError: litert-torch is missing, the model cannot be exported or converted, the file computes another
            number of layers in integers than it should or on other grids, or it cannot be written.
    """
    require_litert_torch()
    program = program_of(source, example, batches)
    with explained("LiteRT's converter cannot take the network", "Export the part that maps tensors to tensors."):
        data = _converted(with_weights(program, _rounding))
    file = LiteRTFile(data)
    integer = sum(layer.computes_integers for layer in file.layers)
    expected = len(program.layers) - len(program.float_outputs)
    if integer != expected:
        raise ExportError(
            f"The file computes {integer} layers in 8-bit integers where {expected} should be: {file.layers}."
        )
    notes = _notes(program, file)
    for note in notes:
        logger.info(note)
    write_atomically(Path(path), data)
    return LiteRTSummary(
        path=Path(path),
        size_bytes=len(data),
        layers=len(program.layers),
        integer_layers=integer,
        float_layers=program.float_outputs,
        integer_inputs=file.integer_inputs,
        integer_outputs=file.integer_outputs,
        notes=notes,
    )


def _converted(program: QuantizedProgram) -> bytes:
    """Return the file that litert-torch makes of a program, whose weights pass a quantize operator."""
    import litert_torch
    from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
    from litert_torch.quantize.quant_config import QuantConfig

    # It says no more than that there are operators to join with integer kernels; nothing is quantized by it.
    joining = QuantConfig(pt2e_quantizer=PT2EQuantizer().set_global(get_symmetric_quantization_config()))
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder, torch.no_grad():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(io.StringIO()):
            path = Path(folder) / "model.tflite"
            litert_torch.convert(program.graph, program.inputs, quant_config=joining).export(str(path))
        return path.read_bytes()


def _rounding(graph: GraphModule, node: Node, weight: Tensor) -> Node:
    """Let a weight come from a float one through a quantize operator: the converter reads no integer ones."""
    number = constant(graph, f"float_weight_{node.name}", weight)
    quantize = (
        operators.quantize_per_tensor.default
        if node.target is operators.dequantize_per_tensor.default
        else operators.quantize_per_channel.default
    )
    made = number
    for target in (quantize, cast(Callable[..., object], node.target)):
        with graph.graph.inserting_after(made):
            made = graph.graph.call_function(target, (made, *node.args[1:]))
    return made


def _notes(program: QuantizedProgram, file: LiteRTFile) -> tuple[str, ...]:
    notes = [*program.float_outputs_note("LiteRT")]
    lost = len({grid for grid in _grids(program) if grid not in file.grids})
    if lost:
        notes.append(
            f"LiteRT's converter left out {lost} of {len(_grids(program))} grids of activations: it drops the rounding "
            "between two operators that it computes in floating point, and the second of two roundings of one tensor."
        )
    return tuple(notes)


def _grids(program: QuantizedProgram) -> set[tuple[float, int]]:
    """Return scales, as float32 holds them, and zero points of a program's activations."""
    grids = [rounding.grid for rounding in roundings(program.graph.graph)]
    return {(float(torch.tensor(grid.scale)), grid.zero_point) for grid in grids}


@dataclass(frozen=True)
class LiteRTLayer:
    """An operator with weights in a file.

    Args:
        operator: Its name.
        types: Types of input, weight and output: ``"INT8"``, ``"FLOAT32"``, ...
    """

    operator: str
    types: tuple[str, ...]

    @property
    def computes_integers(self) -> bool:
        """Whether input, weight and output are int8."""
        return set(self.types) == {"INT8"}


class LiteRTFile:
    """What a ``.tflite`` file holds.

    Args:
        data: Its content.

    Attributes:
        layers: Its operators with weights, in order.
        grids: Scale and zero point of every tensor that has one of each.
        integer_inputs: Whether all its inputs are int8.
        integer_outputs: Whether all its outputs are.
    """

    def __init__(self, data: bytes) -> None:
        from ai_edge_litert import schema_py_generated as schema

        names = {value: name for name, value in vars(schema.TensorType).items() if isinstance(value, int)}
        kinds = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
        model = schema.ModelT.InitFromPackedBuf(data, 0)
        graph = model.subgraphs[0]
        codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
        types = [names[tensor.type] for tensor in graph.tensors]
        self.layers = []
        for each in graph.operators:
            kind = kinds[codes[each.opcodeIndex]]
            if kind in LAYERS:
                # A transposed convolution reads the shape of its output first, then the weight, then its input.
                read = [each.inputs[i] for i in ((2, 1) if kind == "TRANSPOSE_CONV" else (0, 1))]
                self.layers.append(LiteRTLayer(kind, tuple(types[i] for i in (*read, each.outputs[0]))))
        self.grids = {
            (float(tensor.quantization.scale[0]), int(tensor.quantization.zeroPoint[0]))
            for tensor in graph.tensors
            if tensor.quantization is not None
            and tensor.quantization.scale is not None
            and len(tensor.quantization.scale) == 1
        }
        self.integer_inputs = all(types[i] == "INT8" for i in graph.inputs)
        self.integer_outputs = all(types[i] == "INT8" for i in graph.outputs)


def require_litert_torch() -> None:
    """Make sure that litert-torch is installed.

    Raises:
        ExportError: It is not; the message says what to install.
    """
    if find_spec("litert_torch") is None:
        raise ExportError(f"This needs the litert-torch package: {LITERT_TORCH}")
