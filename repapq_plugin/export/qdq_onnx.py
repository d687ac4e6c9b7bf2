"""ONNX files with QuantizeLinear/DequantizeLinear pairs around integer weights."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from repapq_plugin.core.files import write_atomically
from repapq_plugin.errors import ExportError
from repapq_plugin.export.deploy import DeployedLayer, deployable, without_quantizers
from repapq_plugin.reparam.norms import is_norm

LOGGER = logging.getLogger(__name__)

MIN_OPSET = 13
"""First operator set whose DequantizeLinear takes a scale per channel."""

MERGED_OPERATORS = ("Clip", "QuantizeLinear", "DequantizeLinear")
WEIGHTED_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


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


@dataclass(frozen=True)
class _Expected:
    """What one forward of the deployed model did: the graph must do the same."""

    outputs: list[Tensor]
    layer_calls: int
    input_pairs: int
    clamps: int
    norms: int
    weights: dict[str, Tensor]


def export_onnx(
    model_or_result: Any,
    example: Tensor | tuple[Any, ...],
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
    expected = _run(deployed, args)
    names = _Names(args, expected.outputs, input_names, output_names, dynamic_batch)
    proto = _trace(deployed, args, names, opset)
    _tidy(proto.graph)
    if expected.layer_calls:
        plain = _trace(without_quantizers(model), args, names, opset)
        _tidy(plain.graph)
        _verify(proto, plain, expected)
    data = proto.SerializeToString()
    write_atomically(Path(path), data)
    pairs, weights = _count_pairs(proto.graph)
    return OnnxSummary(
        path=Path(path),
        q_dq_pairs=pairs,
        weight_dq=weights,
        integer_layers=expected.layer_calls,
        operators=dict(_operators(proto.graph)),
        size_bytes=len(data),
        max_rel_difference=_difference_in_onnxruntime(data, args, expected.outputs),
    )


def quantized_module(model_or_result: Any) -> nn.Module:
    """Return the module itself, or a calibration result's ``.model``."""
    model = model_or_result
    if not isinstance(model, nn.Module):
        model = getattr(model_or_result, "model", None)
    if not isinstance(model, nn.Module):
        raise ExportError(
            f"Cannot export a {type(model_or_result).__name__}; give a torch module or a calibration result."
        )
    return model


def require_onnx() -> None:
    """Fail with the remedy if onnx is not installed."""
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ExportError("Export needs the onnx package: pip install 'repapq-plugin[export]'") from error


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists and dictionaries, in the order in which ONNX lists them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


class _Names:
    """Names of the graph's inputs and outputs, and which of their axes are open."""

    def __init__(
        self,
        args: tuple[Any, ...],
        outputs: list[Tensor],
        input_names: Sequence[str] | None,
        output_names: Sequence[str] | None,
        dynamic_batch: bool,
    ) -> None:
        inputs = list(tensors_in(args))
        self.inputs = self._choose("input", inputs, input_names)
        self.outputs = self._choose("output", outputs, output_names)
        named = zip(self.inputs + self.outputs, inputs + outputs, strict=True)
        self.dynamic_axes = {name: {0: "batch"} for name, x in named if x.dim() and dynamic_batch}

    @staticmethod
    def _choose(kind: str, tensors: list[Tensor], names: Sequence[str] | None) -> list[str]:
        if names is None:
            return [kind] if len(tensors) == 1 else [f"{kind}_{i}" for i in range(len(tensors))]
        if len(names) != len(tensors) or len(set(names)) != len(names):
            raise ExportError(
                f"{kind}_names={list(names)} must be {len(tensors)} different names, one for each {kind} of the model."
            )
        return list(names)


@torch.no_grad()
def _run(deployed: nn.Module, args: tuple[Any, ...]) -> _Expected:
    """Run the deployed model once and note what its layers read."""
    read: list[tuple[Tensor, tuple[Any, ...]]] = []  # the tensors are kept, so that an id stays theirs
    calls = norms = 0
    layers = {name: m for name, m in deployed.named_modules() if isinstance(m, DeployedLayer)}

    def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal calls
        layer = cast(DeployedLayer, layer)
        calls += layer.quantizes_weight
        if layer.quantizes_input:
            x = inputs[0]
            grid = (float(layer.input_scale), int(layer.input_zero_point), layer.clamp_range)
            read.append((x, (id(x), x._version, *grid)))

    def note_norm(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal norms
        norms += 1

    hooks = [layer.register_forward_pre_hook(note) for layer in layers.values()]
    hooks += [module.register_forward_pre_hook(note_norm) for module in deployed.modules() if is_norm(module)]
    try:
        outputs = deployed(*args)
    except Exception as error:
        raise ExportError(f"The model cannot run on the example: {type(error).__name__}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    keys = {key for _, key in read}
    return _Expected(
        outputs=[x.detach() for x in tensors_in(outputs)],
        layer_calls=calls,
        input_pairs=len(keys),
        clamps=sum(key[-1] is not None for key in keys),
        norms=norms,
        weights={name: layer.weight_codes for name, layer in layers.items() if layer.quantizes_weight},
    )


def _trace(module: nn.Module, args: tuple[Any, ...], names: _Names, opset: int) -> Any:
    """Return the ONNX model proto of ``module``."""
    import onnx

    buffer = io.BytesIO()
    try:
        # The tracing exporter: it follows any Python that runs, where the newer one needs a program
        # without data-dependent control flow. It warns about its age and about every traced shape.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                args,
                buffer,  # type: ignore[arg-type]
                dynamo=False,
                opset_version=opset,
                input_names=names.inputs,
                output_names=names.outputs,
                dynamic_axes=names.dynamic_axes,
            )
        return onnx.load_from_string(buffer.getvalue())
    except Exception as error:
        raise ExportError(
            f"The model cannot be traced to ONNX opset {opset}: {type(error).__name__}: {error}. Export the "
            "part of the model that maps tensors to tensors."
        ) from error


def _tidy(graph: Any) -> None:
    """Bring the traced graph to its shortest form; its meaning stays."""
    _constants_to_initializers(graph)
    _drop_identities(graph)
    _merge_equal_nodes(graph)
    _transpose_weights(graph)
    _separate_weight_zero_points(graph)
    _drop_unused(graph)
    del graph.value_info[:]


def _constants_to_initializers(graph: Any) -> None:
    for node in list(graph.node):
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = node.attribute[0].t
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
            graph.node.remove(node)


def _rewire(graph: Any, old: str, new: str) -> None:
    """Let every reader of value ``old`` read ``new`` (readers inside subgraphs too)."""
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                if subgraph.node:
                    _rewire(subgraph, old, new)


def _drop_identities(graph: Any) -> None:
    results = {value.name for value in graph.output}
    for node in list(graph.node):
        if node.op_type == "Identity" and node.output[0] not in results:
            _rewire(graph, node.output[0], node.input[0])
            graph.node.remove(node)


def _digest(tensor: Any) -> str:
    import onnx.numpy_helper

    array = onnx.numpy_helper.to_array(tensor)
    return f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"


def _merge_equal_nodes(graph: Any) -> None:
    """Let layers that read one tensor on one grid share its quantize/dequantize pair."""
    digests = {tensor.name: _digest(tensor) for tensor in graph.initializer}
    results = {value.name for value in graph.output}
    first: dict[tuple[Any, ...], str] = {}
    for node in list(graph.node):  # in topological order, so inputs are merged before their readers
        if node.op_type not in MERGED_OPERATORS or node.output[0] in results:
            continue
        attributes = tuple(sorted(a.SerializeToString() for a in node.attribute))
        key = (node.op_type, *(digests.get(name, name) for name in node.input), attributes)
        if key in first:
            _rewire(graph, node.output[0], first[key])
            graph.node.remove(node)
        else:
            first[key] = node.output[0]


def _transpose_weights(graph: Any) -> None:
    """Store the weight of a matrix product the way round that it is read."""
    import onnx
    from onnx import helper, numpy_helper

    initializers = {tensor.name: tensor for tensor in graph.initializer}
    dequantize = (node for node in graph.node if node.op_type == "DequantizeLinear")
    weights = {node.output[0]: node for node in dequantize if node.input[0] in initializers}
    for node in list(graph.node):
        if node.op_type != "Transpose" or node.input[0] not in weights:
            continue
        source = weights[node.input[0]]
        codes = numpy_helper.to_array(initializers[source.input[0]])
        if codes.ndim != 2:
            continue
        name = f"{source.input[0]}_by_input"
        if name not in initializers:
            initializers[name] = numpy_helper.from_array(codes.T.copy(), name)
            graph.initializer.append(initializers[name])
        twin = onnx.NodeProto()
        twin.CopyFrom(source)
        twin.name, twin.input[0], twin.output[0] = node.name, name, node.output[0]
        axis = next(a.i for a in source.attribute if a.name == "axis")
        del twin.attribute[:]
        twin.attribute.append(helper.make_attribute("axis", 1 - axis))
        node.CopyFrom(twin)


def _separate_weight_zero_points(graph: Any) -> None:
    """Give each weight a zero point of its own, where the exporter let weights share equal ones.

    onnxruntime refuses a file in which two weights share it when it widens s8 weights to u8
    (``session.x64quantprecision``), the mode that is exact on processors without VNNI.
    """
    import onnx

    initializers = {tensor.name: tensor for tensor in graph.initializer}
    taken: set[str] = set()
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in initializers:
            continue
        shared = node.input[2]
        if shared in taken:
            own = onnx.TensorProto()
            own.CopyFrom(initializers[shared])
            own.name = f"{node.input[0]}.zero_point"
            graph.initializer.append(own)
            node.input[2] = own.name
        taken.add(node.input[2])


def _drop_unused(graph: Any) -> None:
    """Remove weight nodes and initializers that nothing reads any more."""
    used = _names_read(graph)
    for node in reversed(list(graph.node)):
        if node.op_type in MERGED_OPERATORS and node.output[0] not in used:
            graph.node.remove(node)
    used = _names_read(graph)
    for tensor in list(graph.initializer):
        if tensor.name not in used:
            graph.initializer.remove(tensor)


def _names_read(graph: Any) -> set[str]:
    names = {value.name for value in graph.output}
    for node in graph.node:
        names.update(node.input)
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                names |= _names_read(subgraph)
    return names


def _operators(graph: Any) -> Counter[str]:
    return Counter(node.op_type for node in graph.node)


def _count_pairs(graph: Any) -> tuple[int, int]:
    """Return the number of pairs on activations and of DequantizeLinear nodes on weights."""
    initializers = {tensor.name for tensor in graph.initializer}
    weights = sum(n.op_type == "DequantizeLinear" and n.input[0] in initializers for n in graph.node)
    return _operators(graph)["QuantizeLinear"], weights


def _verify(proto: Any, plain: Any, expected: _Expected) -> None:
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
    allowed = _operators(plain.graph) + Counter(Clip=expected.clamps, BatchNormalization=expected.norms)
    counts = _operators(graph)
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
    pairs, _ = _count_pairs(graph)
    if len(layers) != expected.layer_calls or pairs > expected.input_pairs:
        raise ExportError(
            f"The graph has {len(layers)} layers with integer weights and {pairs} quantize/dequantize pairs; "
            f"the model has {expected.layer_calls} and {expected.input_pairs}."
        )
    stored = {_digest(tensor) for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    for name, codes in expected.weights.items():
        forms = (codes, codes.T) if codes.dim() == 2 else (codes,)
        arrays = [onnx.numpy_helper.from_array(form.contiguous().cpu().numpy()) for form in forms]
        if not any(_digest(array) in stored for array in arrays):
            raise ExportError(f"{name}: the integer weights in the graph are not the model's.")


def _difference_in_onnxruntime(data: bytes, args: tuple[Any, ...], outputs: list[Tensor]) -> float | None:
    """Run the graph as it is written, node by node, and return the largest relative difference."""
    try:
        import onnxruntime
    except ImportError:
        LOGGER.info("onnxruntime is not installed: the file was checked, but not run.")
        return None
    options = onnxruntime.SessionOptions()
    # What is checked is the file's meaning; integer kernels are a runtime's own business.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    inputs = zip(session.get_inputs(), tensors_in(args), strict=True)
    feeds = {value.name: x.detach().cpu().numpy() for value, x in inputs}
    return relative_difference(session.run(None, feeds), outputs)


def relative_difference(results: Sequence[Any], outputs: Sequence[Tensor]) -> float:
    """Return ``max |result - output| / max |output|``, the largest over all outputs (0 for equal zeros)."""
    worst = 0.0
    for result, output in zip(results, outputs, strict=True):
        if output.numel():
            reference = output.detach().cpu().double()
            difference = (torch.as_tensor(result).double() - reference).abs().max()
            largest = reference.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
            worst = max(worst, float(difference / largest))
    return worst
