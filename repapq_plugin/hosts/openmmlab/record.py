"""`Record`: what ``result.json`` holds."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from numbers import Real
from pathlib import Path

import torch
from mmengine.config import Config

from repapq_plugin import __version__
from repapq_plugin.core.files import write_atomically
from repapq_plugin.core.origin import Origin
from repapq_plugin.hosts.openmmlab.settings import Settings
from repapq_plugin.hosts.openmmlab.work import Exported, Latency
from repapq_plugin.result import Calibrated

RECORD_FILE = "result.json"
"""Name of the record in a work folder."""

IMPORT_NAMES = (
    *("torch", "mmengine", "mmcv", "mmdet", "mmyolo", "mmpretrain", "mmseg"),
    *("onnx", "onnxruntime", "openvino"),
)


@dataclass
class Record:
    """Everything worth knowing about one quantization; written as ``result.json``.

    Args:
        config: Path of the config file.
        checkpoint: Path of the float checkpoint.
        scheme: One line: bits, granularity, starting ranges.
        settings: All of `Settings`, the quantizer's keys and the seed among them.
        scores: The toolbox's metrics, by what was scored: ``float``, ``plain_ptq`` (min-max ranges, nothing learned),
            ``repapq`` (simulated, or as another host runs it), ``onnxruntime``, ``openvino``.
        size_bytes: Size of exported networks, by the same names.
        latency: Milliseconds a batch of one takes on OpenVINO, ``float`` against ``openvino``, and
            how that was measured (see `compare_on_openvino`).
        kernels: Kernel of each convolution and matrix product in OpenVINO's executed graph, by the
            same names; those in integers end in ``I8``.
        exports: Per exported network: operators, Quantize/Dequantize pairs, integer layers, and the
            largest difference from the torch network on one image (`OnnxSummary`, `OpenVINOSummary`).
        calibration: `Calibrated.summary`: per unit the loss before and after and whether
            its result was kept; what was merged; bits of each layer; layers that stayed float and
            why; seconds.
        files: Every file written, by what it is.
        seconds: Wall clock of each step.
        versions: Of the plugin, torch, the toolboxes and the runtimes, where installed.
        machine: Processor, its vector extensions that matter for integers, cores, threads.
    """

    config: str
    checkpoint: str
    scheme: str
    settings: dict[str, object]
    scores: dict[str, dict[str, float | None]] = field(default_factory=dict)
    size_bytes: dict[str, int] = field(default_factory=dict)
    latency: Latency = field(default_factory=Latency)
    kernels: dict[str, dict[str, str]] = field(default_factory=dict)
    exports: dict[str, dict[str, object]] = field(default_factory=dict)
    calibration: Mapping[str, object] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, object] = field(default_factory=dict)

    @classmethod
    def start(cls, cfg: Config, checkpoint: str | None, settings: Settings, result: Calibrated) -> Record:
        """Begin a record with all that is known after a calibration."""
        return cls(
            config=str(getattr(cfg, "filename", None) or ""),
            checkpoint=str(checkpoint or ""),
            scheme=result.config.scheme,
            settings=dataclasses.asdict(settings),
            calibration=result.summary(),
            versions=versions(),
            machine=machine(),
        )

    def add_scores(self, name: str, metrics: Mapping[str, object]) -> None:
        """Keep the numbers among the metrics of one evaluation; NaN becomes ``None``."""
        # Real: some metrics are numpy scalars.
        values = {key: float(value) for key, value in metrics.items() if isinstance(value, Real)}
        self.scores[name] = {key: value if math.isfinite(value) else None for key, value in values.items()}

    def add_file(self, name: str, *paths: Path) -> None:
        """Note files that were written."""
        self.files[name] = [str(path) for path in paths]

    def add_exported(self, name: str, exported: Exported) -> None:
        """Note an exported network, its size, and what the exporter counted and compared."""
        self.add_file(name, *exported.files)
        self.size_bytes[name] = exported.summary.size_bytes
        self.exports[name] = {
            key: value
            for key, value in dataclasses.asdict(exported.summary).items()
            if key not in ("path", "weights_path", "size_bytes", "kernels")
        }

    def write(self, folder: Path) -> Path:
        """Write ``result.json`` into ``folder``, whole or not at all.

        Raises:
            ExportError: It cannot be written.
        """
        path = folder / RECORD_FILE
        self.add_file("record", path)
        values = {"format": "repapq-record-1", **dataclasses.asdict(self)}
        write_atomically(path, (json.dumps(values, indent=1, default=str, allow_nan=False) + "\n").encode())
        return path


def made_from(
    cfg: Config, cfg_options: Sequence[str], checkpoint: str | None, settings: Settings, result: Calibrated
) -> Origin:
    """Return how a quantized toolbox model was made: what its files say.

    Args:
        cfg: The whole config.
        cfg_options: Overrides that it was read with.
        checkpoint: Path or address of the float weights.
        settings: What the config says about RepAPQ.
        result: What the calibration returned.
    """
    path = getattr(cfg, "filename", None)
    return Origin(
        result.config,
        settings.host,
        str(Path(path).resolve()) if path else "",
        tuple(cfg_options),
        str(checkpoint or "").rstrip("/").rpartition("/")[2],
        versions(),
    )


def versions() -> dict[str, str]:
    """Return versions of what takes part, by import name."""
    # The toolboxes come under several distribution names, so they are looked up by what they install.
    installed = metadata.packages_distributions()
    found = {name: metadata.version(installed[name][0]) for name in IMPORT_NAMES if name in installed}
    return {"repapq_plugin": __version__, **found}


def machine() -> dict[str, object]:
    """Return processor, core count and the vector extensions that integer kernels use."""
    model, flags = platform.processor(), set[str]()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    extensions = [name for name in ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8") if name in flags]
    return {
        "processor": model,
        "extensions": extensions,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
