"""A calibrated network that another host runs in its own form, with everything else still the plugin's."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.errors import ExportError, HostError
from repapq_plugin.export.openvino import OpenVINOSummary, export_openvino
from repapq_plugin.export.qdq_onnx import OnnxSummary, export_onnx
from repapq_plugin.job import Progress, quantize_model
from repapq_plugin.result import CalibrationResult

logger = logging.getLogger(__name__)

SAVED_AS = "repapq.safetensors"
"""Name of the saved calibration in a folder."""

Maker = Callable[[nn.Module, Sequence[Tensor]], nn.Module]
"""``maker(calibrated network, batches of images)`` returns the form in which a host runs it."""


@dataclass(frozen=True)
class HostedNetwork:
    """What a host runs, and the calibration that it stands for.

    Args:
        network: Takes images and returns the raw outputs.
        result: The calibration; its notes say why ``network`` is the simulated one, if it is.
    """

    network: nn.Module
    result: CalibrationResult

    def save(self, folder: Path) -> list[Path]:
        """Write the calibration into ``folder``; return the files."""
        return [self.result.save(folder / SAVED_AS)]

    def export(self, kind: str, example: Tensor, path: Path) -> OnnxSummary | OpenVINOSummary:
        """Write the calibrated network for a runtime.

        Args:
            kind: ``'onnx'`` or ``'openvino'``.
            example: Images, float ``(N, C, H, W)``.
            path: File to write, without suffix.

        Raises:
            ExportError: There is no such kind, or see `export_onnx` and `export_openvino`.
        """
        if kind == "onnx":
            return export_onnx(self.result, example, path.with_name(f"{path.name}.onnx"))
        if kind == "openvino":
            return export_openvino(self.result, example, path.with_name(f"{path.name}.xml"))
        raise ExportError(f"kind={kind!r} is not allowed; choose onnx or openvino.")


def calibrate_for_host(
    network: nn.Module,
    images: Sequence[Tensor],
    config: RepAPQConfig,
    progress: Callable[[Progress], None] | None,
    maker: Maker,
) -> HostedNetwork:
    """Calibrate a network and hand it to a host; where the host cannot take it, it stays simulated.

    Args:
        network: Takes images, float ``(N, C, H, W)``; not changed.
        images: Calibration batches.
        config: Bits, ranges and calibration.
        progress: Called as the work goes on.
        maker: Makes the host's form; raises `HostError` with the reason where it cannot.
    """
    result = quantize_model(network, images, config, progress=progress)
    try:
        made = maker(result.model, images)
    except HostError as error:
        note = f"The network runs simulated: {error}"
        logger.warning(note)
        return HostedNetwork(result.model, dataclasses.replace(result, notes=(*result.notes, note)))
    return HostedNetwork(made, result)
