"""What a finished ONNX graph is held against: the model, the float graph, and a run of the file."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from repapq_plugin.core.tensors import tensors_of
from repapq_plugin.errors import ExportError
from repapq_plugin.export.onnx_tidy import digest
from repapq_plugin.export.onnx_trace import Expected

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx

LOGGER = logging.getLogger(__name__)

WEIGHTED_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators of the layers that are quantized."""


def operators(graph: onnx.GraphProto) -> Counter[str]:
    """Return the number of nodes by operator; those inside subgraphs do not count."""
    return Counter(node.op_type for node in graph.node)


def count_pairs(graph: onnx.GraphProto) -> tuple[int, int]:
    """Return the number of pairs on activations and of DequantizeLinear nodes on weights."""
    initializers = {tensor.name for tensor in graph.initializer}
    weights = sum(n.op_type == "DequantizeLinear" and n.input[0] in initializers for n in graph.node)
    return operators(graph)["QuantizeLinear"], weights


def verify(proto: onnx.ModelProto, plain: onnx.ModelProto, expected: Expected) -> None:
    """Compare the graph with the model that it was made from and with the float graph.

    Raises:
        ExportError: The graph is not valid ONNX, has an operator too many, misses a quantizer, or
            holds other integers than the model.
    """
    import onnx

    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"The traced graph is not valid ONNX: {error}") from error
    graph = proto.graph
    # A norm that the merge had to leave (several read one shared convolution) vanishes from the float graph
    # alone: the tracer folds it into a copy of the float weights, and integer ones stay shared.
    allowed = operators(plain.graph) + Counter(Clip=expected.clamps, BatchNormalization=expected.norms)
    counts = operators(graph)
    quantizers = {"QuantizeLinear", "DequantizeLinear"}
    extra = {op: n - allowed[op] for op, n in counts.items() if op not in quantizers and n > allowed[op]}
    if extra:
        raise ExportError(f"The quantized graph has operators that the float graph lacks: {extra}.")
    produced = {node.output[0]: node for node in graph.node}
    initializers = {tensor.name: tensor for tensor in graph.initializer}

    def dequantizes_weight(name: str) -> bool:
        node = produced.get(name)
        return node is not None and node.op_type == "DequantizeLinear" and node.input[0] in initializers

    layers = [n for n in graph.node if n.op_type in WEIGHTED_OPERATORS and dequantizes_weight(n.input[1])]
    pairs, _ = count_pairs(graph)
    if len(layers) != expected.layer_calls or pairs > expected.input_pairs:
        raise ExportError(
            f"The graph has {len(layers)} layers with integer weights and {pairs} quantize/dequantize pairs; "
            f"the model has {expected.layer_calls} and {expected.input_pairs}."
        )
    stored = {digest(tensor) for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    for name, codes in expected.weights.items():
        forms = (codes, codes.T) if codes.dim() == 2 else (codes,)
        arrays = [onnx.numpy_helper.from_array(form.contiguous().cpu().numpy()) for form in forms]
        if not any(digest(array) in stored for array in arrays):
            raise ExportError(f"{name}: the integer weights in the graph are not the model's.")


def difference_in_onnxruntime(data: bytes, args: tuple[object, ...], outputs: list[Tensor]) -> float | None:
    """Run the graph as it is written, node by node, and return its `relative_difference` to the model.

    Args:
        data: The ONNX file's content.
        args: What the model was called with.
        outputs: What it returned.

    Returns:
        ``None`` without onnxruntime.
    """
    try:
        import onnxruntime
    except ImportError:
        LOGGER.info("onnxruntime is not installed: the file was checked, but not run.")
        return None
    options = onnxruntime.SessionOptions()
    # What is checked is the file's meaning; integer kernels are a runtime's own business.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    inputs = zip(session.get_inputs(), tensors_of(args), strict=True)
    feeds = {value.name: x.detach().cpu().numpy() for value, x in inputs}
    return relative_difference(session.run(None, feeds), outputs)


def relative_difference(results: Sequence[Tensor | npt.NDArray[np.generic]], outputs: Sequence[Tensor]) -> float:
    """Return ``max |result - output| / max |output|``, in float64, the largest over all outputs.

    Where all are finite and no output is zero throughout, this is `core.compare.relative_error`. It differs
    beyond: for an output of zeros the difference is relative to the smallest normal float32 (0 for equal
    zeros), NaN counts as no difference, and shapes may broadcast.

    Args:
        results: What a runtime returned, arrays or tensors of any type.
        outputs: What the model returned, in the same order.

    Raises:
        ValueError: There are more or fewer results than outputs.
    """
    worst = 0.0
    for result, output in zip(results, outputs, strict=True):
        if output.numel():
            reference = output.detach().cpu().double()
            difference = (torch.as_tensor(result).double() - reference).abs().max()
            largest = reference.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
            worst = max(worst, float(difference / largest))
    return worst
