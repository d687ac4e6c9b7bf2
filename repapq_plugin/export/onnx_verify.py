"""What a finished ONNX graph is held against: the model, the float graph, and a run of the file."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from repapq_plugin.core.onnx_weights import integer_layers, weight_nodes
from repapq_plugin.errors import ExportError
from repapq_plugin.export.blame import explained, layer_in
from repapq_plugin.export.onnx_tidy import digest
from repapq_plugin.export.onnx_trace import Expected

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx

LOGGER = logging.getLogger(__name__)

INT32 = 6
"""ONNX's number of the type that biases are stored in."""

OTHER_FORM = "Export with another opset, or only the part of the model that maps tensors to tensors."
"""What to do about a graph that something refuses."""


def operators(graph: onnx.GraphProto) -> Counter[str]:
    """Return the number of nodes by operator; those inside subgraphs do not count."""
    return Counter(node.op_type for node in graph.node)


def different_operators(graph: onnx.GraphProto) -> Counter[str]:
    """Return the number of nodes by operator, those once that compute the same from the same.

    The tracer finds two equal calls of a layer only in the float graph.
    """
    same = {tensor.name: digest(tensor) for tensor in graph.initializer}
    first: dict[tuple[object, ...], onnx.NodeProto] = {}
    for node in graph.node:  # in topological order
        attributes = tuple(sorted(attribute.SerializeToString() for attribute in node.attribute))
        key = (node.op_type, *(same.get(name, name) for name in node.input), attributes)
        twin = first.setdefault(key, node)
        same.update(zip(node.output, twin.output, strict=False))
    return Counter(node.op_type for node in first.values())


def count_pairs(graph: onnx.GraphProto) -> tuple[int, int]:
    """Return the number of pairs on activations and of DequantizeLinear nodes on weights."""
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
    biases = sum(stored[node.input[0]] == INT32 for node in weight_nodes(graph))
    return operators(graph)["QuantizeLinear"], len(list(weight_nodes(graph))) - biases


def verify(
    proto: onnx.ModelProto,
    plain: onnx.ModelProto,
    expected: Expected,
    model: nn.Module,
    unread: Callable[[], Mapping[str, int]],
) -> list[str]:
    """Compare the graph with the model that it was made from and with the float graph.

    Args:
        proto: The tidied graph.
        plain: The float graph, tidied too.
        expected: What one run of the model says that the graph must hold.
        model: The deployed model, for the names of its layers.
        unread: Gives the `onnx_trace.unread_calls` of its layers, if they are needed.

    Returns:
        Layers that the graph does without, as nothing reads what they return.

    Raises:
        ExportError: The graph is not valid ONNX, has an operator too many, misses a quantizer, or
            holds other integers than the model.
    """
    import onnx

    with explained("The traced graph is not valid ONNX", OTHER_FORM, lambda error: layer_in(str(error), model)):
        onnx.checker.check_model(proto, full_check=True)
    graph = proto.graph
    # A norm that the merge had to leave (several read one shared convolution) vanishes from the float graph
    # alone: the tracer folds it into a copy of the float weights, and integer ones stay shared.
    allowed = operators(plain.graph) + Counter(Clip=expected.clamps, BatchNormalization=expected.norms)
    counts = different_operators(graph)
    quantizers = {"QuantizeLinear", "DequantizeLinear"}
    extra = {op: n - allowed[op] for op, n in counts.items() if op not in quantizers and n > allowed[op]}
    if extra:
        raise ExportError(f"The quantized graph has operators that the float graph lacks: {extra}.")
    layers = integer_layers(graph)
    pairs, _ = count_pairs(graph)
    missing = expected.layer_calls - len(layers)
    idle = unread() if missing > 0 else {}
    if not -expected.other_reads <= missing <= sum(idle.values()) or pairs > expected.input_pairs:
        raise ExportError(
            f"The graph has {len(layers)} layers with integer weights and {pairs} quantize/dequantize pairs; "
            f"the model has {expected.layer_calls} and {expected.input_pairs}."
        )
    stored = {digest(tensor) for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    for name, codes in expected.weights.items():
        forms = (codes, codes.T) if codes.dim() == 2 else (codes,)
        arrays = [onnx.numpy_helper.from_array(form.contiguous().cpu().numpy()) for form in forms]
        if not any(digest(array) in stored for array in arrays) and not idle.get(name):
            raise ExportError(f"{name}: the integer weights in the graph are not the model's.")
    return sorted(idle)


def reading_floats(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return those of `integer_layers` whose input is no integer either: nobody can compute them in integers alone."""
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    return [node for node in integer_layers(graph) if node.input[0] not in dequantized]


class RuntimeCheck:
    """The graph in onnxruntime as it is written, node by node: integer kernels are a runtime's own business.

    Args:
        data: The ONNX file's content.
        model: The deployed model, for the names of its layers.

    Raises:
        ExportError: onnxruntime is missing, or cannot load the graph.
    """

    FAILURE = "onnxruntime cannot run the graph"

    def __init__(self, data: bytes, model: nn.Module) -> None:
        import onnxruntime

        self._where = lambda error: layer_in(str(error), model)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        with explained(self.FAILURE, OTHER_FORM, self._where):
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the graph's outputs on inputs by name; inputs that the graph does not have are left out.

        Raises:
            ExportError: onnxruntime cannot run it.
        """
        names = {value.name for value in self._session.get_inputs()}
        feeds = {name: x.detach().cpu().numpy() for name, x in inputs.items() if name in names}
        with explained(self.FAILURE, OTHER_FORM, self._where):
            return [torch.as_tensor(result) for result in self._session.run(None, feeds)]


def has_onnxruntime() -> bool:
    """Whether onnxruntime is installed; if not, that is logged."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        LOGGER.info("onnxruntime is not installed: the file was checked, but not run.")
        return False
    return True


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
