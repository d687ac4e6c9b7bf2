"""ONNX files with QuantizeLinear/DequantizeLinear pairs around integer weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.files import write_atomically
from repapq_plugin.core.onnx_weights import integer_layers
from repapq_plugin.core.origin import Origin, origin_of
from repapq_plugin.errors import ExportError
from repapq_plugin.export.blame import explained, layer_in
from repapq_plugin.export.calls import Call, Example
from repapq_plugin.export.deploy import deployable, without_quantizers
from repapq_plugin.export.onnx_batch import SecondBatch, parts_of, reason_against, run_second_batch
from repapq_plugin.export.onnx_names import Axes, GraphNames
from repapq_plugin.export.onnx_rounding import repeat_roundings, store_biases
from repapq_plugin.export.onnx_tidy import tidy
from repapq_plugin.export.onnx_trace import Expected, run_once, trace, unread_calls
from repapq_plugin.export.onnx_verify import (
    OTHER_FORM,
    RuntimeCheck,
    count_pairs,
    has_onnxruntime,
    operators,
    reading_floats,
    relative_difference,
    verify,
)
from repapq_plugin.export.origins import set_properties
from repapq_plugin.targets import TARGETS, Target
from repapq_plugin.targets.target import GENERIC

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger(__name__)

__all__ = ["OnnxSummary", "export_onnx", "quantized_module", "require_onnx"]

EQUAL = 1e-3
"""Up to which difference to the file, relative to the largest output, nobody asks why."""

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
            twice counts twice; one whose result nothing reads is left out).
        operators: Number of nodes by operator.
        size_bytes: Size of the file.
        max_rel_difference: Largest difference between the model's outputs on the example and the
            graph's, run node by node in onnxruntime, relative to the model's largest output;
            ``None`` without onnxruntime. About 1e-6, unless an activation falls on the other side
            of a rounding boundary, which moves it by one step of its grid.
        float_inputs: How many of the integer layers read their input in floating point, because it is
            not quantized or something that is no padding stands in between: runtimes compute them in
            floating point.
        dynamic_batch: Whether the first axis of inputs and outputs is open; then the graph ran with
            two batch sizes.
        notes: What is worth knowing about the file, in sentences.
    """

    path: Path
    q_dq_pairs: int
    weight_dq: int
    integer_layers: int
    operators: Mapping[str, int]
    size_bytes: int
    max_rel_difference: float | None
    float_inputs: int = 0
    dynamic_batch: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Network:
    """What is exported.

    Args:
        model: The quantized module.
        deployed: Its export form.
        call: The call that the example stands for.
        expected: What that does.
        names: Names of inputs and outputs.
        opset: ONNX operator set.
        origin: How it was made; ``None`` where nobody knows.
        target: What it is written for.
    """

    model: nn.Module
    deployed: nn.Module
    call: Call
    expected: Expected
    names: GraphNames
    opset: int
    origin: Origin | None
    target: Target

    def named(self, call: Call) -> dict[str, Tensor]:
        """Return the tensors of a call by the names of the graph's inputs."""
        return dict(zip(self.names.inputs, call.tensors, strict=True))


@dataclass(frozen=True)
class _Written:
    """A graph that passed its checks.

    Args:
        graph: The graph.
        data: Its file's content.
        difference: How far onnxruntime is from the model, if that is there.
        unread: Layers that it does without, as nothing reads what they return.
    """

    graph: onnx.GraphProto
    data: bytes
    difference: float | None
    unread: Sequence[str] = ()


def export_onnx(
    model_or_result: object,
    example: Example,
    path: str | os.PathLike[str],
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_batch: bool = True,
    opset: int | None = None,
    target: Target | None = None,
) -> OnnxSummary:
    """Write a quantized model as ONNX, in the form that integer runtimes turn into integer kernels.

    Weights are int8 initializers behind a DequantizeLinear; each activation that quantized layers
    read passes one QuantizeLinear/DequantizeLinear pair (behind a Clip where its grid has fewer
    than 8 bits). Nothing else is added to the float graph; this is checked before the file is
    written. A model without quantized layers is written as the float graph that it is. A calibration result's bits,
    target and versions stand in the file's properties (`repapq_plugin.core.origin`).

    Args:
        model_or_result: The quantized module, or anything that holds it as ``.model``.
        example: One input as ``forward`` takes it, or the tuple of all of them; batch first. A dict at the
            end holds keywords, as for ``torch.onnx.export``. Tensors in containers are inputs of their own.
            Floating tensors of another dtype than the network's are cast to that.
        path: File to write; replaced atomically.
        input_names: Names of the graph's inputs; default ``input`` or ``input_0``, ``input_1``...
        output_names: Names of the outputs, in order; default ``output`` or ``output_0``...
        dynamic_batch: Leave the first dimension of inputs and outputs open, if the graph then computes
            what the model does for one sample more too; if not, the summary's notes say why.
        opset: ONNX operator set, 13 or newer; default: that of the target.
        target: For what the file is written; default: that for which a result was made.

    Raises:
        ExportError: A package is missing, a layer is not ready for export, the model cannot be
            traced, the written graph failed a check, or the file cannot be written.
    """
    require_onnx()
    target = target or target_of(model_or_result)
    opset = target.opset if opset is None else opset
    if opset < MIN_OPSET:
        raise ExportError(f"opset={opset} has no scales per channel; choose {MIN_OPSET} or newer.")
    model = quantized_module(model_or_result)
    deployed = deployable(model)
    if any(weight.dtype is torch.float64 for weight in model.parameters()):
        raise ExportError(
            "The network is in double precision, where runtimes have no integers; quantize model.float()."
        )
    call = Call.of(example, deployed)
    expected = run_once(deployed, call)
    names = GraphNames(call.tensors, expected.outputs, input_names, output_names)
    network = _Network(model, deployed, call, expected, names, opset, origin_of(model_or_result), target)
    notes = []
    opened, reason = _with_open_batch(network) if dynamic_batch else (None, "")
    written = opened or _written(network, {})
    if reason:
        notes.append(f"The batch size is fixed to the example's: {reason}.")
        logger.warning(notes[-1])
    if written.unread:
        notes.append(f"Nothing reads what these layers return, and the file does without: {', '.join(written.unread)}.")
        logger.warning(notes[-1])
    if written.difference and written.difference > EQUAL and run_once(deployed, call).differs_from(expected):
        notes.append("The model returns something else in each run, and the file cannot be compared with it.")
        logger.warning(notes[-1])
    floats = reading_floats(written.graph)
    if floats:
        where = sorted({layer_in(node.name, deployed) or node.name for node in floats})
        notes.append(f"These layers with integer weights read their input in floating point: {', '.join(where)}.")
        logger.info(notes[-1])
    write_atomically(Path(path), written.data)
    pairs, weights = count_pairs(written.graph)
    return OnnxSummary(
        path=Path(path),
        q_dq_pairs=pairs,
        weight_dq=weights,
        integer_layers=len(integer_layers(written.graph)),
        operators=dict(operators(written.graph)),
        size_bytes=len(written.data),
        max_rel_difference=written.difference,
        float_inputs=len(floats),
        dynamic_batch=opened is not None,
        notes=tuple(notes),
    )


def _with_open_batch(network: _Network) -> tuple[_Written | None, str]:
    """Return the file with an open batch, or why it cannot be open."""
    call, expected = network.call, network.expected
    second = run_second_batch(network.deployed, call, expected.outputs)
    if second.reason:
        return None, second.reason
    axes = network.names.open_axes(call.tensors, expected.outputs, (second.call.tensors, second.outputs))
    try:
        return _written(network, axes, second), ""
    except ExportError as error:  # if the reason is another, the fixed one meets it too
        return None, str(error).rstrip(".")


def _written(network: _Network, axes: Mapping[str, Axes], second: SecondBatch | None = None) -> _Written:
    """Trace the network, and check the graph.

    Args:
        network: What is exported.
        axes: Open axes of the inputs and outputs.
        second: What the model does for another batch size; the graph has to do the same.

    Raises:
        ExportError: It cannot be traced, or a check failed.
    """
    deployed, call, expected = network.deployed, network.call, network.expected
    proto = trace(deployed, call, network.names, axes, network.opset)
    tidy(proto.graph)
    unread: Sequence[str] = ()
    if expected.layer_calls:
        float_model = without_quantizers(network.model)
        plain = trace(float_model, call, network.names, axes, network.opset)
        tidy(plain.graph)
        unread = verify(proto, plain, expected, deployed, lambda: unread_calls(float_model, call, expected.weights))
        if network.target.quantized_operators:
            repeat_roundings(proto.graph, network.target.quantized_operators)
        if network.target.rounds_biases:
            store_biases(proto.graph)
    if network.origin is not None:
        set_properties(proto, network.origin.to_text())
    with explained("The graph does not fit into one file", "Export the model in parts below 2 GiB."):
        data = proto.SerializeToString()
    if not has_onnxruntime():
        return _Written(proto.graph, data, None, unread)
    check = RuntimeCheck(data, deployed)
    with explained("The graph's outputs on the example are not of the model's shapes", OTHER_FORM):
        difference = relative_difference(check.run(network.named(call)), expected.outputs)
    if second is not None:
        reason = reason_against(
            lambda made: check.run(network.named(made)),
            second,
            lambda: parts_of(without_quantizers(network.model), call),
        )
        if reason:
            raise ExportError(reason)
    return _Written(proto.graph, data, difference, unread)


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


def target_of(model_or_result: object) -> Target:
    """Return the target for which a result was made; `GENERIC` of what has no configuration."""
    config = getattr(model_or_result, "config", None)
    return config.runs_on if isinstance(config, RepAPQConfig) else TARGETS[GENERIC]


def require_onnx() -> None:
    """Make sure that onnx is installed.

    Raises:
        ExportError: It is not; the message says what to install.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ExportError("Export needs the onnx package: pip install 'repapq-plugin[export]'") from error
