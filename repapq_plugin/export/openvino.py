"""OpenVINO IR files, and what a compiled model really runs in integers."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from repapq_plugin.core.copies import own_copy
from repapq_plugin.core.files import unwritable
from repapq_plugin.core.origin import origin_of
from repapq_plugin.core.tensors import tensors_of
from repapq_plugin.errors import ExportError
from repapq_plugin.export.blame import explained, layer_in
from repapq_plugin.export.calls import Call, Example
from repapq_plugin.export.deploy import without_quantizers
from repapq_plugin.export.onnx_batch import parts_of, reason_against, run_second_batch
from repapq_plugin.export.onnx_verify import relative_difference
from repapq_plugin.export.origins import read_origin, write_origin
from repapq_plugin.export.qdq_onnx import export_onnx, quantized_module, target_of
from repapq_plugin.targets import Target

if TYPE_CHECKING:
    import openvino

logger = logging.getLogger(__name__)

OTHER_SOURCE = "Export only the part of the model that maps tensors to tensors, or give export_onnx another opset."
"""What to do about a graph that OpenVINO refuses."""

COMPUTE_LAYERS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
"""OpenVINO's names of the layers that have weights, in its executed graph."""


@dataclass(frozen=True)
class OpenVINOSummary:
    """What was written, and what a compilation of it on this processor runs.

    Args:
        path: The ``.xml`` file with the graph.
        weights_path: The ``.bin`` file beside it.
        size_bytes: Size of both.
        integer_layers: Layers that have integer weights; ``None`` if a file was converted.
        kernels: Kernel of every convolution and matrix product by its name in the executed graph;
            integer ones end in ``I8``, or in ``i8`` where their input is signed.
        max_rel_difference: Largest difference between the compiled model's outputs on the example
            and the torch model's, relative to the largest output; ``None`` if a file was converted.
            Processors without VNNI add 8-bit products in 16 bits, which saturates where weights
            *and* activations use all 8 bits; a large value there is that. Weights of 7 bits never
            saturate.
        dynamic_batch: Whether the batch is open; then the compiled model ran with two batch sizes. False if a
            file was converted.
        notes: What is worth knowing about the files, in sentences.
    """

    path: Path
    weights_path: Path
    size_bytes: int
    integer_layers: int | None
    kernels: Mapping[str, str]
    max_rel_difference: float | None
    dynamic_batch: bool = False
    notes: tuple[str, ...] = ()


def export_openvino(
    model_or_result_or_onnx_path: object,
    example: Example,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    target: Target | None = None,
) -> OpenVINOSummary:
    """Write a quantized model as OpenVINO IR, ``path`` (``.xml``) and its ``.bin`` beside it.

    The IR is made from the same graph as `export_onnx` writes, and is run once on the example; an ONNX file is
    converted without running it. How the network was made stands in the IR's ``rt_info``.

    Args:
        model_or_result_or_onnx_path: The quantized module, anything that holds it as ``.model``, or
            the path of an ONNX file that `export_onnx` wrote.
        example: See `export_onnx`.
        path: The ``.xml`` file to write; both files appear only once they are complete.
        dynamic_batch: Leave the first dimension open, if another batch size really runs. A fixed one lets
            processors without AVX-512 run transposed convolutions in integers too.
        target: For what the file is written; default: that for which a result was made.

    Raises:
        ExportError: A package is missing, the model cannot be exported or converted, or the files
            cannot be written.
    """
    ov = require_openvino()
    path = Path(path).with_suffix(".xml")
    source = model_or_result_or_onnx_path
    try:
        with written_whole(path) as partial:
            if isinstance(source, str | os.PathLike):
                onnx_path = Path(source)
                if not onnx_path.is_file():
                    raise ExportError(f"There is no ONNX file {onnx_path}; write it with export_onnx first.")
                summary = _summary(_convert(ov, onnx_path, partial), path)
                origin = read_origin(onnx_path) if onnx_path.suffix == ".onnx" else None
            else:
                target = target or target_of(source)
                summary = _from_model(ov, quantized_module(source), example, partial, dynamic_batch, target)
                origin = origin_of(source)
            if origin is not None:
                write_origin(partial, origin)
    except OSError as error:
        raise unwritable(path, error) from error
    for note in summary.notes:
        logger.info(note)
    size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    return replace(summary, path=path, weights_path=path.with_suffix(".bin"), size_bytes=size)


@contextmanager
def written_whole(xml: Path) -> Iterator[Path]:
    """Let the block write an IR elsewhere, and put its two files in their places at the end; not where it fails.

    Yields:
        Path of the ``.xml`` file to write, in a folder of its own beside ``xml``.

    Raises:
        OSError: The folder cannot be made or written.
    """
    xml.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{xml.name}.", dir=xml.parent) as folder:
        partial = Path(folder) / xml.name
        yield partial
        for suffix in (".bin", ".xml"):
            partial.with_suffix(suffix).replace(xml.with_suffix(suffix))


def _summary(compiled: openvino.CompiledModel, path: Path) -> OpenVINOSummary:
    """Return what a compiled model says of itself; the files are not in their place yet."""
    return OpenVINOSummary(path, path, 0, None, layer_kernels(compiled), None)


def _from_model(
    ov: ModuleType, model: nn.Module, example: Example, xml: Path, dynamic_batch: bool, target: Target
) -> OpenVINOSummary:
    """Write a model to ``xml``, its batch open only if OpenVINO runs another one, and return what was written."""
    onnx_path = xml.with_name("model.onnx")
    written = export_onnx(model, example, onnx_path, dynamic_batch=dynamic_batch, target=target)
    compiled = _convert(ov, onnx_path, xml, model)
    simulation = own_copy(model).eval()
    call = Call.of(example, simulation)
    with torch.no_grad():
        outputs = tensors_of(call.run(simulation))
    difference = relative_difference(_run(compiled, call, model), outputs)
    notes = written.notes
    if written.dynamic_batch:
        second = run_second_batch(simulation, call, outputs)
        try:
            # Where 8-bit products saturate, they do so for any batch.
            reason = reason_against(
                lambda made: _run(compiled, made, model),
                second,
                lambda: parts_of(without_quantizers(model), call),
                at_least=difference,
            )
        except ExportError as error:
            reason = str(error).rstrip(".")
        if reason:
            note = f"The batch size is fixed to the example's in OpenVINO: {reason}."
            logger.warning(note)
            del compiled  # it may still read the file that is written anew
            fixed = _from_model(ov, model, example, xml, False, target)
            return replace(fixed, notes=(note, *fixed.notes))
    summary = _summary(compiled, xml)
    integer = sum(map(computes_integers, summary.kernels.values()))
    if integer < written.integer_layers:
        others = [name for name, kernel in summary.kernels.items() if not computes_integers(kernel)]
        notes += (
            f"{integer} of {written.integer_layers} layers with integer weights run in 8-bit integers on this "
            f"processor; these run in floating point: {', '.join(others)}.",
        )
    return replace(
        summary,
        integer_layers=written.integer_layers,
        max_rel_difference=difference,
        dynamic_batch=written.dynamic_batch,
        notes=notes,
    )


def require_openvino() -> ModuleType:
    """Return the ``openvino`` module.

    Raises:
        ExportError: It is not installed; the message says what to install.
    """
    try:
        import openvino
    except ImportError as error:
        raise ExportError("This needs the openvino package: pip install 'repapq-plugin[export]'") from error
    module: ModuleType = openvino
    return module


def _convert(ov: ModuleType, onnx_path: Path, xml: Path, model: nn.Module | None = None) -> openvino.CompiledModel:
    """Write the IR and return what compiles from the written files, which proves that they are whole."""
    core = ov.Core()
    failure = f"OpenVINO cannot convert {onnx_path.name}, or write {xml.name}"
    with explained(failure, OTHER_SOURCE, lambda error: layer_in(str(error), model) if model is not None else ""):
        ov.save_model(core.read_model(onnx_path), xml, compress_to_fp16=False)
        return core.compile_model(core.read_model(xml), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def _run(compiled: openvino.CompiledModel, call: Call, model: nn.Module) -> list[Tensor]:
    """Return the outputs of a compiled model for a call of the torch one."""
    arrays = [x.detach().cpu().numpy() for x in call.tensors]
    with explained("OpenVINO cannot run the model", OTHER_SOURCE, lambda error: layer_in(str(error), model)):
        results = compiled(arrays)
        return [torch.as_tensor(results[i]).clone() for i in range(len(compiled.outputs))]


def layer_kernels(compiled_model: openvino.CompiledModel) -> dict[str, str]:
    """Return the kernel of every convolution and matrix product in the executed graph, by name.

    Args:
        compiled_model: A compiled model on a CPU.
    """
    kernels = {}
    for node in compiled_model.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        if info["layerType"].astype(str) in COMPUTE_LAYERS:
            kernels[node.get_friendly_name()] = info["primitiveType"].astype(str)
    return kernels


def computes_integers(kernel: str) -> bool:
    """Whether a kernel of `layer_kernels` computes in 8-bit integers, unsigned (``I8``) or signed (``i8``)."""
    return kernel.lower().endswith("i8")


def int8_layers(compiled_model: openvino.CompiledModel) -> dict[str, str]:
    """Return the entries of `layer_kernels` that compute in 8-bit integers."""
    return {name: kernel for name, kernel in layer_kernels(compiled_model).items() if computes_integers(kernel)}


def check_int8(compiled_model: openvino.CompiledModel, expected: int) -> dict[str, str]:
    """Return `int8_layers`, after making sure that there are as many as there should be.

    Args:
        compiled_model: A compiled model on a CPU.
        expected: Number of layers with integer weights (`OnnxSummary.integer_layers`).

    Raises:
        ExportError: Some of them run in floating point; the message names what does.
    """
    kernels = layer_kernels(compiled_model)
    integer = {name: kernel for name, kernel in kernels.items() if computes_integers(kernel)}
    if len(integer) < expected:
        others = {name: kernel for name, kernel in kernels.items() if name not in integer}
        raise ExportError(
            f"{len(integer)} layers run in 8-bit integers where {expected} have integer weights; these run "
            f"otherwise: {others}. Transposed convolutions need a fixed batch on processors without AVX-512, "
            "and an input grid with zero point 0 (what follows a ReLU has one) everywhere."
        )
    return integer
