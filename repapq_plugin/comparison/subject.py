"""What is compared: one float network, its calibration data, its metric; and how a quantized form of it is judged."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from repapq_plugin.comparison.methods import SCHEME
from repapq_plugin.comparison.table import finite
from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.fingerprints import Fingerprint, fingerprint
from repapq_plugin.errors import ConfigError
from repapq_plugin.evaluation.latency import measure_latency
from repapq_plugin.evaluation.runtimes import OnnxRuntimeNetwork, OpenVINONetwork, RuntimeNetwork
from repapq_plugin.export.openvino import export_openvino
from repapq_plugin.export.qdq_onnx import export_onnx
from repapq_plugin.merging import merge_for_inference

Runtime = Literal["openvino", "onnxruntime", "none"]
RUNTIMES: tuple[Runtime, ...] = ("openvino", "onnxruntime", "none")
"""What can run networks in integers; or nothing does."""

Score = Callable[[nn.Module], "float | Mapping[str, float]"]
"""Returns the metrics of a network that takes one tensor; of each more is better."""

FLOAT_FILE = "float"
"""Name of the merged float network's files, without suffix."""


@dataclass(frozen=True)
class Judged:
    """What a network scores on a runtime, and what its file is like.

    Args:
        scores: By metric.
        size_bytes: Of the file or files.
        latency_ms: Milliseconds of one sample, median; ``None``: not timed.
        float_ms: The same of the float network, in turns with it.
        notes: What the export says.
    """

    scores: Mapping[str, float]
    size_bytes: int
    latency_ms: float | None = None
    float_ms: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """One float network and all that its methods share.

    Args:
        model: Takes one tensor; branched or merged.
        batches: Calibration batches, float ``(N, ...)``.
        metric: Scores a network.
        scheme: Says bits, target and patterns.
        runtime: What runs exported networks.
        folder: Takes files.
        timed: Whether networks are timed.

    Raises:
        ConfigError: A batch is no tensor, or there is none.
    """

    model: nn.Module
    batches: Sequence[Tensor]
    metric: Score
    scheme: RepAPQConfig
    runtime: Runtime
    folder: Path
    timed: bool = True
    threads: int = field(default_factory=torch.get_num_threads)

    def __post_init__(self) -> None:
        if not self.batches or not all(isinstance(batch, Tensor) and len(batch) for batch in self.batches):
            kinds = ", ".join(sorted({type(batch).__name__ for batch in self.batches})) or "no batch"
            raise ConfigError(
                f"batches: {kinds} is not allowed; give tensors of samples, and a model that takes one of them "
                "(wrap it in a module that does)."
            )
        if self.runtime not in RUNTIMES:
            raise ConfigError(f"runtime={self.runtime!r} is not allowed; choose one of {', '.join(RUNTIMES)}.")

    @property
    def example(self) -> Tensor:
        """One sample, ``(1, ...)``."""
        return self.batches[0][:1].clone()

    @cached_property
    def merged(self) -> nn.Module:
        """The float network as it is deployed: branches merged, norms folded."""
        with torch.no_grad():
            return merge_for_inference(self.model, lambda model: model(self.batches[0])).network.eval()

    @cached_property
    def float_onnx(self) -> Path:
        """The merged float network as a file."""
        path = self.folder / f"{FLOAT_FILE}.onnx"
        export_onnx(self.merged, self.example, path)
        return path

    @cached_property
    def _float_file(self) -> Path:
        """The merged float network as the runtime reads it."""
        if self.runtime == "onnxruntime":
            return self.float_onnx
        return export_openvino(self.float_onnx, self.example, self.folder / f"{FLOAT_FILE}.xml").path

    def score(self, network: nn.Module) -> dict[str, float]:
        """Return the metrics of a network, by name."""
        with torch.no_grad():
            return finite(self.metric(network))

    def judge_file(self, path: Path) -> Judged:
        """Score and time a quantized network's file on the runtime.

        Args:
            path: ``.onnx``; OpenVINO gets an IR of it, as of all others, or ``.xml``.

        Raises:
            ExportError: The runtime is missing or cannot load it.
        """
        if self.runtime == "openvino" and path.suffix == ".onnx":
            path = export_openvino(path, self.example, path.with_suffix(".xml")).path
        scores = self.score(self._opened(path))
        times = self._times({"float": self._float_file, "it": path}) if self.timed else {}
        return Judged(scores, _size(path), times.get("it"), times.get("float"))

    def judge(self, quantized: object, path: Path) -> Judged:
        """Export a calibration result to ``path``, which has no suffix, and judge it.

        Raises:
            ExportError: It cannot be exported, or the runtime is missing.
        """
        onnx = export_onnx(quantized, self.example, path.with_name(f"{path.name}.onnx"))
        if self.runtime == "onnxruntime":
            return self.judge_file(onnx.path)
        written = export_openvino(quantized, self.example, path.with_name(f"{path.name}.xml"))
        found = self.judge_file(written.path)
        return Judged(found.scores, found.size_bytes, found.latency_ms, found.float_ms, written.notes)

    def judge_float(self, scores: Mapping[str, float]) -> Judged:
        """Return the scores of the float network with what its file is like on the runtime, if there is one."""
        if self.runtime == "none":
            return Judged(scores, 0)
        path = self._float_file
        times = self._times({"float": path}) if self.timed else {}
        return Judged(scores, _size(path), times.get("float"), times.get("float"))

    def _times(self, paths: Mapping[str, Path]) -> Mapping[str, float]:
        """Return the median time of one sample in milliseconds, all networks in turns."""
        sample = [self.example.cpu().numpy()]
        opened = {name: self._opened(path, timed=True) for name, path in paths.items()}
        return measure_latency({name: partial(it.run_arrays, sample) for name, it in opened.items()}).median_ms

    def _opened(self, path: Path, timed: bool = False) -> RuntimeNetwork:
        if self.runtime == "onnxruntime":
            return OnnxRuntimeNetwork(path, threads=self.threads, arithmetic="native" if timed else "integer")
        shapes = [tuple(self.example.shape)] if timed else None
        return OpenVINONetwork(path, threads=self.threads, input_shapes=shapes)

    def fingerprint(self) -> Fingerprint:
        """Return what all rows depend on."""
        told = {"runtime": self.runtime}
        found = fingerprint(self.model, self.batches, self.scheme, told, ())
        shared = {key: value for key, value in found["config"].items() if key in (*SCHEME, "steps")}
        return {**{key: value for key, value in found.items() if key != "machine"}, "config": shared}

    def describe(self) -> str:
        """Return the calibration data in a line."""
        samples = sum(len(batch) for batch in self.batches)
        shape = "x".join(map(str, self.batches[0].shape[1:]))
        return f"{samples} calibration samples of {shape} in {len(self.batches)} batches, the same for all"

    def machine(self) -> str:
        """Return what runs all this, in a line."""
        return f"{platform.machine()}, {os.cpu_count()} cores, {self.threads} threads"


def _size(path: Path) -> int:
    """Return the bytes of a network's file; an IR has two."""
    files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
    return sum(file.stat().st_size for file in files)
