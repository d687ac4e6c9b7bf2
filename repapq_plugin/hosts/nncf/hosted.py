"""NNCF as an engine for hosts that hand over a network and prepared images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nncf
import nncf.torch
import torch
from torch import Tensor, nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.errors import ConfigError, ExportError
from repapq_plugin.export.openvino import OpenVINOSummary, layer_kernels, require_openvino
from repapq_plugin.export.qdq_onnx import relative_difference, tensors_in
from repapq_plugin.hosts.nncf.quantization import quantize_with_record
from repapq_plugin.job import Progress
from repapq_plugin.result import CalibrationResult

STATE_FILE = "nncf.pth"
"""Holds ``config`` for `nncf.torch.load_from_config` and ``state_dict``."""

ENUMS: dict[str, Any] = {
    "target_device": nncf.TargetDevice,
    "preset": nncf.QuantizationPreset,
    "model_type": nncf.ModelType,
}
"""Options that a config gives by the name of a member."""


@dataclass(frozen=True)
class NNCFNetwork:
    """A network that NNCF quantized, and the record of it."""

    result: CalibrationResult

    @property
    def network(self) -> nn.Module:
        """The quantized network."""
        return self.result.model

    def save(self, folder: Path) -> list[Path]:
        """Write `STATE_FILE`, whole or not at all."""
        path = folder / STATE_FILE
        temporary = path.with_suffix(".part")
        state = {"config": nncf.torch.get_config(self.network), "state_dict": self.network.state_dict()}
        try:
            torch.save(state, temporary)
            temporary.replace(path)
        except (OSError, RuntimeError) as error:
            raise ExportError(f"Cannot write {path}: {error}.") from error
        finally:
            temporary.unlink(missing_ok=True)
        return [path]

    def export(self, kind: str, example: Tensor, path: Path) -> OpenVINOSummary:
        """Write an OpenVINO IR, and run it once on ``example``.

        Raises:
            ExportError: ``kind`` is not ``'openvino'``, or the network cannot be converted or written.
        """
        if kind != "openvino":
            raise ExportError(
                f"NNCF's networks are exported to OpenVINO, not to {kind}; choose export='openvino', or the plugin's "
                "own quantizers."
            )
        ov = require_openvino()
        target = path.with_name(path.name + ".xml")
        with torch.no_grad():
            expected = list(tensors_in(self.network(example)))
        try:
            converted = ov.convert_model(self.network, example_input=example)
            ov.save_model(converted, target, compress_to_fp16=False)
            compiled = ov.Core().compile_model(target, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        except (RuntimeError, OSError) as error:
            raise ExportError(f"OpenVINO cannot convert NNCF's network: {error}") from error
        results = compiled(example.numpy())
        kernels = layer_kernels(compiled)
        binary = target.with_suffix(".bin")
        return OpenVINOSummary(
            path=target,
            weights_path=binary,
            size_bytes=target.stat().st_size + binary.stat().st_size,
            integer_layers=sum(kernel.endswith("I8") for kernel in kernels.values()),
            kernels=kernels,
            max_rel_difference=relative_difference([results[port] for port in compiled.outputs], expected),
        )


def quantize_network(
    network: nn.Module,
    images: Sequence[Tensor],
    config: RepAPQConfig,
    progress: Callable[[Progress], None] | None,
    options: Mapping[str, Any],
) -> NNCFNetwork:
    """Quantize a network on prepared images with NNCF's placement.

    Args:
        network: Images to tensors; not changed.
        images: Calibration batches, float ``(N, C, H, W)``.
        config: Bits, ranges and calibration.
        progress: Called as the work goes on.
        options: ``target_device``, ``preset`` and ``model_type`` of `nncf.quantize`, by name.

    Raises:
        ConfigError: An option is not allowed; and see `quantize`.
    """
    arguments = {key: _member(key, value) for key, value in options.items()}
    result = quantize_with_record(
        network, nncf.Dataset(list(images)), subset_size=len(images), repapq=config, progress=progress, **arguments
    )
    return NNCFNetwork(result)


def _member(key: str, value: Any) -> Any:
    if key not in ENUMS:
        raise ConfigError(f"quantizer.options.{key} is not a key of the NNCF engine; known keys: {', '.join(ENUMS)}.")
    names = [member.name for member in ENUMS[key]]
    if str(value).upper() not in names:
        raise ConfigError(f"quantizer.options.{key}={value!r} is not allowed; choose one of {', '.join(names)}.")
    return ENUMS[key][str(value).upper()]
