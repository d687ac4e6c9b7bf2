"""What a quantization is made of: calibrate, take the network part out, export it, open a runtime, time it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn

from repapq_plugin.backend import OwnBackend
from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.checkpoints import Checkpoints
from repapq_plugin.core.origin import Origin
from repapq_plugin.errors import HostError
from repapq_plugin.evaluation.latency import measure_latency
from repapq_plugin.evaluation.runtimes import OnnxRuntimeNetwork, OpenVINONetwork
from repapq_plugin.export.openvino import OpenVINOSummary, export_openvino, layer_kernels
from repapq_plugin.export.origins import write_origin
from repapq_plugin.export.qdq_onnx import export_onnx
from repapq_plugin.hosts.hosted import SAVED_AS, QuantizedNetwork, Summary
from repapq_plugin.hosts.openmmlab.network import TensorPath, preprocess, run_batch, serving_points
from repapq_plugin.hosts.openmmlab.other_hosts import QuantizeNetwork, keeps_checkpoints
from repapq_plugin.job import Job, Report
from repapq_plugin.result import CalibrationResult
from repapq_plugin.targets import Target

RESULT_FILE = SAVED_AS
"""Name of the saved result in a work folder."""

DEFAULT_FLOAT = "float, by default"
"""Name of the float network in the precision that OpenVINO takes by itself."""

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "program": ".pt2", "executorch": ".pte", "litert": ".tflite"}
"""What the main file of each export format ends in."""


class Latency(TypedDict, total=False):
    """Times of networks that took turns on OpenVINO.

    Attributes:
        median_ms: Milliseconds of one run, by name: the median over the rounds. The float network runs in float32.
        min_ms: The fastest round.
        max_ms: The slowest round.
        speedup: Median ratio of the first network's time to that of each other one.
        precision: What layers that are not integer computed in, by name: ``f32``, ``bf16`` or ``f16``.
        default_float: The same of the float network in OpenVINO's default precision, where that is not float32:
            ``precision``, ``median_ms``, and ``speedup`` of the last network over it.
        rounds: How many rounds were timed.
        threads: Threads of one run; ``None`` lets OpenVINO choose.
        how: All that in a line.
    """

    median_ms: dict[str, float]
    min_ms: dict[str, float]
    max_ms: dict[str, float]
    speedup: dict[str, float]
    precision: dict[str, str]
    default_float: dict[str, str | float]
    rounds: int
    threads: int | None
    how: str


@dataclass(frozen=True)
class Exported:
    """One exported network.

    Args:
        files: What it consists of; the first is the one that a runtime opens.
        summary: What the exporter counted and compared.
    """

    files: tuple[Path, ...]
    summary: Summary

    @classmethod
    def of(cls, summary: Summary) -> Exported:
        """Return what a summary speaks of."""
        weights = (summary.weights_path,) if isinstance(summary, OpenVINOSummary) else ()
        return cls((summary.path, *weights), summary)

    @property
    def path(self) -> Path:
        """The file that a runtime opens."""
        return self.files[0]

    def made_by(self, origin: Origin) -> Exported:
        """Write into the files how they were made, whoever wrote them, and return this with their new size.

        Raises:
            ExportError: They cannot be written.
        """
        write_origin(self.path, origin)
        size = sum(file.stat().st_size for file in self.files)
        return replace(self, summary=replace(self.summary, size_bytes=size))


def writable_folder(path: str | Path) -> Path:
    """Make a folder and make sure that files can be written into it, before any work is done.

    Raises:
        HostError: It cannot be made or written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise HostError(
            f"The work folder {folder} cannot be written: {error.strerror or error}. Choose another with --work-dir."
        ) from error
    return folder


def calibrate(
    model: nn.Module,
    batches: Sequence[object],
    config: RepAPQConfig,
    progress: Report | None = None,
    checkpoints: Checkpoints | None = None,
) -> CalibrationResult:
    """Quantize a toolbox model on collated batches; the model is not changed."""
    # A test loop runs without gradients; calibration learns.
    with torch.enable_grad():
        return Job(OwnBackend(), config, run_batch, progress, checkpoints).run(model, batches)


def calibrate_on_host(
    quantize: QuantizeNetwork,
    model: nn.Module,
    batches: Sequence[object],
    config: RepAPQConfig,
    options: Mapping[str, object],
    progress: Report | None = None,
    checkpoints: Checkpoints | None = None,
) -> QuantizedNetwork:
    """Let another host quantize a toolbox model's network part; the model is not changed.

    Raises:
        HostError: The model has no network part that can be taken out.
    """
    keywords = {"checkpoints": checkpoints} if keeps_checkpoints(quantize) else {}
    serving_points(model)
    with torch.no_grad():
        images = [preprocess(model, batch)["inputs"] for batch in batches]
    with torch.enable_grad():
        return quantize(TensorPath(model).eval(), images, config, progress, options, **keywords)


def example_images(model: nn.Module, batches: Sequence[object]) -> Tensor:
    """Return the first image of the first batch as the network sees it, float ``(1, C, H, W)``."""
    with torch.no_grad():
        images = preprocess(model, batches[0])["inputs"]
    return images[:1].clone()


def export_network(model: nn.Module, example: Tensor, path: Path, kind: str, target: Target | None = None) -> Exported:
    """Export the network part of a toolbox model.

    Args:
        model: A detector, classifier or segmentor, quantized or float.
        example: Preprocessed image, float ``(1, C, H, W)``; its size is the exported one.
        path: File to write, without suffix.
        kind: ``'onnx'`` or ``'openvino'``.
        target: For what the file is written; ``None``: for any runtime.

    Raises:
        HostError: The model has no network part that can be taken out.
        ExportError: See `export_onnx` and `export_openvino`.
    """
    serving_points(model)
    return export_tensor_path(TensorPath(model).eval(), example, path, kind, target)


def export_tensor_path(
    network: nn.Module, example: Tensor, path: Path, kind: str, target: Target | None = None
) -> Exported:
    """Export a network part that was taken out already; see `export_network`."""
    file = path.with_name(path.name + SUFFIXES[kind])
    if kind == "onnx":
        return Exported.of(export_onnx(network, example, file, target=target))
    return Exported.of(export_openvino(network, example, file, target=target))


def open_network(path: str | Path, backend: str, threads: int | None = None) -> nn.Module:
    """Open an exported network with a runtime, for scoring (in full float precision outside integers).

    Args:
        path: ``.onnx`` or ``.xml`` file.
        backend: ``'onnxruntime'`` or ``'openvino'``.
        threads: Threads of one run; ``None`` lets the runtime choose.

    Raises:
        HostError: The file does not exist, or the runtime cannot read its kind.
    """
    file = Path(path)
    readers: Mapping[str, tuple[str, ...]] = {"onnxruntime": (".onnx",), "openvino": (".xml", ".onnx")}
    if not file.is_file():
        raise HostError(f"The exported network {file} does not exist.")
    if file.suffix not in readers[backend]:
        raise HostError(f"{backend} cannot read {file.name}; give a file ending in {' or '.join(readers[backend])}.")
    if backend == "onnxruntime":
        return OnnxRuntimeNetwork(file, threads=threads)
    return OpenVINONetwork(file, threads=threads)


def compare_on_openvino(
    paths: Mapping[str, Path], example: Tensor, threads: int | None = None
) -> tuple[Latency, dict[str, dict[str, str]]]:
    """Time exported networks in turn on OpenVINO, and read which kernels they ran.

    Args:
        paths: ``.xml`` files by the names to report them under, the float one first. It is timed in float32, and in
            OpenVINO's default precision where that is another.
        example: Preprocessed image, float ``(1, C, H, W)``.
        threads: Threads of one run; ``None`` lets OpenVINO choose.

    Returns:
        The timing, and by name the kernel of each convolution and matrix product (those in integers end in ``I8``).
    """
    # Fixed shapes, and for the integer network what OpenVINO takes by itself: bf16 beside integers on some processors.
    first = next(iter(paths))
    shapes = [tuple(example.shape)]
    networks = {
        name: OpenVINONetwork(path, threads=threads, precision="f32" if name == first else None, input_shapes=shapes)
        for name, path in paths.items()
    }
    default = OpenVINONetwork(paths[first], threads=threads, precision=None, input_shapes=shapes)
    raced = networks if default.precision == networks[first].precision else {**networks, DEFAULT_FLOAT: default}
    image = [example.cpu().numpy()]
    report = measure_latency({name: partial(network.run_arrays, image) for name, network in raced.items()}, rounds=100)
    size = "x".join(str(side) for side in example.shape)
    precision = {name: network.precision for name, network in networks.items()}
    said = [f"{name} in {used}" if name == first else f"{name} in int8 and {used}" for name, used in precision.items()]
    how = f"latency: median of {report.rounds} paired runs on OpenVINO, {', '.join(said)}"
    latency: Latency = {
        "median_ms": {name: report.median_ms[name] for name in networks},
        "min_ms": {name: report.min_ms[name] for name in networks},
        "max_ms": {name: report.max_ms[name] for name in networks},
        "speedup": {name: report.ratios[first, name] for name in paths if name != first},
        "precision": precision,
        "rounds": report.rounds,
        "threads": threads,
    }
    if DEFAULT_FLOAT in raced:
        last = list(networks)[-1]
        latency["default_float"] = {
            "precision": default.precision,
            "median_ms": report.median_ms[DEFAULT_FLOAT],
            "speedup": report.ratios[DEFAULT_FLOAT, last],
        }
        how += f"; {first} in {default.precision}, its default here, takes {report.median_ms[DEFAULT_FLOAT]:.2f} ms"
    latency["how"] = f"{how}; input {size}, {threads or 'all'} threads"
    return latency, {name: layer_kernels(network.compiled) for name, network in networks.items()}
