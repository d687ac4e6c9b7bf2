"""ONNX files with QuantizeLinear/DequantizeLinear pairs around integer weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from repapq_plugin.core.files import write_atomically
from repapq_plugin.core.tensors import tensors_of as tensors_in
from repapq_plugin.errors import ExportError
from repapq_plugin.export.deploy import deployable, without_quantizers
from repapq_plugin.export.onnx_names import GraphNames
from repapq_plugin.export.onnx_tidy import tidy
from repapq_plugin.export.onnx_trace import run_once, trace
from repapq_plugin.export.onnx_verify import (
    count_pairs,
    difference_in_onnxruntime,
    operators,
    relative_difference,
    verify,
)

__all__ = ["OnnxSummary", "export_onnx", "quantized_module", "relative_difference", "require_onnx", "tensors_in"]

MIN_OPSET = 13
"""First operator set whose DequantizeLinear takes a scale per channel."""


@dataclass(frozen=True)
class OnnxSummary:
    """What was written.

    Args:
        path: The file.
        q_dq_pairs: QuantizeLinear/DequantizeLinear pairs on activations.
        weight_dq: DequantizeLinear nodes on int8 weights.
        integer_layers: Convolutions and matrix products with such weights (a layer that is called
            twice counts twice).
        operators: Number of nodes by operator.
        size_bytes: Size of the file.
        max_rel_difference: Largest difference between the model's outputs on the example and the
            graph's, run node by node in onnxruntime, relative to the model's largest output;
            ``None`` without onnxruntime. About 1e-6, unless an activation falls on the other side
            of a rounding boundary, which moves it by one step of its grid.
    """

    path: Path
    q_dq_pairs: int
    weight_dq: int
    integer_layers: int
    operators: Mapping[str, int]
    size_bytes: int
    max_rel_difference: float | None


def export_onnx(
    model_or_result: object,
    example: Tensor | tuple[object, ...],
    path: str | os.PathLike[str],
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_batch: bool = True,
    opset: int = 17,
) -> OnnxSummary:
    """Write a quantized model as ONNX, in the form that integer runtimes turn into integer kernels.

    Weights are int8 initializers behind a DequantizeLinear; each activation that quantized layers
    read passes one QuantizeLinear/DequantizeLinear pair (behind a Clip where its grid has fewer
    than 8 bits). Nothing else is added to the float graph; this is checked before the file is
    written. A model without quantized layers is written as the float graph that it is.

    Args:
        model_or_result: The quantized module, or anything that holds it as ``.model``.
        example: One input as ``forward`` takes it, or the tuple of all of them; batch first.
        path: File to write; replaced atomically.
        input_names: Names of the graph's inputs; default ``input`` or ``input_0``, ``input_1``...
        output_names: Names of the outputs, in order; default ``output`` or ``output_0``...
        dynamic_batch: Leave the first dimension of inputs and outputs open.
        opset: ONNX operator set, 13 or newer.

    Raises:
        ExportError: A package is missing, a layer is not ready for export, the model cannot be
            traced, the written graph failed a check, or the file cannot be written.
    """
    require_onnx()
    if opset < MIN_OPSET:
        raise ExportError(f"opset={opset} has no scales per channel; choose {MIN_OPSET} or newer.")
    model = quantized_module(model_or_result)
    args = example if isinstance(example, tuple) else (example,)
    deployed = deployable(model)
    expected = run_once(deployed, args)
    names = GraphNames(args, expected.outputs, input_names, output_names, dynamic_batch)
    proto = trace(deployed, args, names, opset)
    tidy(proto.graph)
    if expected.layer_calls:
        plain = trace(without_quantizers(model), args, names, opset)
        tidy(plain.graph)
        verify(proto, plain, expected)
    data = proto.SerializeToString()
    write_atomically(Path(path), data)
    pairs, weights = count_pairs(proto.graph)
    return OnnxSummary(
        path=Path(path),
        q_dq_pairs=pairs,
        weight_dq=weights,
        integer_layers=expected.layer_calls,
        operators=dict(operators(proto.graph)),
        size_bytes=len(data),
        max_rel_difference=difference_in_onnxruntime(data, args, expected.outputs),
    )


def quantized_module(model_or_result: object) -> nn.Module:
    """Return the module itself, or a calibration result's ``.model``.

    Raises:
        ExportError: It is neither.
    """
    model = model_or_result
    if not isinstance(model, nn.Module):
        model = getattr(model_or_result, "model", None)
    if not isinstance(model, nn.Module):
        raise ExportError(
            f"Cannot export a {type(model_or_result).__name__}; give a torch module or a calibration result."
        )
    return model


def require_onnx() -> None:
    """Make sure that onnx is installed.

    Raises:
        ExportError: It is not; the message says what to install.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ExportError("Export needs the onnx package: pip install 'repapq-plugin[export]'") from error
