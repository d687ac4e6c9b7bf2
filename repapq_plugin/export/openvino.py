"""OpenVINO IR files, and what a compiled model really runs in integers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor

from repapq_plugin.core.files import unwritable
from repapq_plugin.core.running import inference
from repapq_plugin.core.tensors import tensors_of
from repapq_plugin.errors import ExportError
from repapq_plugin.export.onnx_verify import relative_difference
from repapq_plugin.export.qdq_onnx import export_onnx, quantized_module

if TYPE_CHECKING:
    import openvino

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
            integer ones end in ``I8``.
        max_rel_difference: Largest difference between the compiled model's outputs on the example
            and the torch model's, relative to the largest output; ``None`` if a file was converted.
            Processors without VNNI add 8-bit products in 16 bits, which saturates where weights
            *and* activations use all 8 bits; a large value there is that. Weights of 7 bits never
            saturate.
    """

    path: Path
    weights_path: Path
    size_bytes: int
    integer_layers: int | None
    kernels: Mapping[str, str]
    max_rel_difference: float | None


def export_openvino(
    model_or_result_or_onnx_path: object,
    example: Tensor | tuple[object, ...],
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
) -> OpenVINOSummary:
    """Write a quantized model as OpenVINO IR, ``path`` (``.xml``) and its ``.bin`` beside it.

    The IR is made from the same graph as `export_onnx` writes, and is run once on the example.

    Args:
        model_or_result_or_onnx_path: The quantized module, anything that holds it as ``.model``, or
            the path of an ONNX file that `export_onnx` wrote.
        example: One input as ``forward`` takes it, or the tuple of all of them; batch first.
        path: The ``.xml`` file to write; both files appear only once they are complete.
        dynamic_batch: Leave the first dimension open. A fixed one lets processors without AVX-512
            run transposed convolutions in integers too.

    Raises:
        ExportError: A package is missing, the model cannot be exported or converted, or the files
            cannot be written.
    """
    ov = require_openvino()
    path = Path(path).with_suffix(".xml")
    source = model_or_result_or_onnx_path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            work = Path(folder)
            integer_layers: int | None = None
            if isinstance(source, str | os.PathLike):
                onnx_path = Path(source)
                if not onnx_path.is_file():
                    raise ExportError(f"There is no ONNX file {onnx_path}; write it with export_onnx first.")
            else:
                onnx_path = work / "model.onnx"
                written = export_onnx(source, example, onnx_path, dynamic_batch=dynamic_batch)
                integer_layers = written.integer_layers
            compiled = _convert(ov, onnx_path, work / path.name)
            for suffix in (".bin", ".xml"):
                (work / path.name).with_suffix(suffix).replace(path.with_suffix(suffix))
    except OSError as error:
        raise unwritable(path, error) from error
    return OpenVINOSummary(
        path=path,
        weights_path=path.with_suffix(".bin"),
        size_bytes=path.stat().st_size + path.with_suffix(".bin").stat().st_size,
        integer_layers=integer_layers,
        kernels=layer_kernels(compiled),
        max_rel_difference=None if integer_layers is None else _difference(compiled, source, example),
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


def _convert(ov: ModuleType, onnx_path: Path, xml_path: Path) -> openvino.CompiledModel:
    """Write the IR and return what compiles from the written files, which proves that they are whole."""
    core = ov.Core()
    try:
        ov.save_model(core.read_model(onnx_path), xml_path, compress_to_fp16=False)
        options = {"INFERENCE_PRECISION_HINT": "f32"}
        return core.compile_model(core.read_model(xml_path), "CPU", options)
    except RuntimeError as error:
        raise ExportError(f"OpenVINO cannot convert {onnx_path.name}, or write {xml_path.name}: {error}") from error


def _difference(compiled: openvino.CompiledModel, source: object, example: Tensor | tuple[object, ...]) -> float:
    """Compare the compiled model with the torch one on the example."""
    model = quantized_module(source)
    args = example if isinstance(example, tuple) else (example,)
    with inference(model):
        outputs = tensors_of(model(*args))
    results = compiled([x.detach().cpu().numpy() for x in tensors_of(args)])
    return relative_difference([results[i] for i in range(len(outputs))], outputs)


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


def int8_layers(compiled_model: openvino.CompiledModel) -> dict[str, str]:
    """Return the entries of `layer_kernels` that compute in 8-bit integers."""
    return {name: kernel for name, kernel in layer_kernels(compiled_model).items() if kernel.endswith("I8")}


def check_int8(compiled_model: openvino.CompiledModel, expected: int) -> dict[str, str]:
    """Return `int8_layers`, after making sure that there are as many as there should be.

    Args:
        compiled_model: A compiled model on a CPU.
        expected: Number of layers with integer weights (`OnnxSummary.integer_layers`).

    Raises:
        ExportError: Some of them run in floating point; the message names what does.
    """
    kernels = layer_kernels(compiled_model)
    integer = {name: kernel for name, kernel in kernels.items() if kernel.endswith("I8")}
    if len(integer) < expected:
        others = {name: kernel for name, kernel in kernels.items() if name not in integer}
        raise ExportError(
            f"{len(integer)} layers run in 8-bit integers where {expected} have integer weights; these run "
            f"otherwise: {others}. Transposed convolutions need a fixed batch on processors without AVX-512, "
            "and an input grid with zero point 0 (what follows a ReLU has one) everywhere."
        )
    return integer
