"""A calibrated network that another host runs in its own form, with everything else still the plugin's."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from repapq_plugin.backend import Backend
from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.checkpoints import Checkpoints
from repapq_plugin.errors import ExportError, HostError
from repapq_plugin.export.executorch import ExecuTorchSummary, export_executorch
from repapq_plugin.export.litert import LiteRTSummary, export_litert
from repapq_plugin.export.openvino import OpenVINOSummary, export_openvino
from repapq_plugin.export.program import ProgramSummary, quantized_program
from repapq_plugin.export.qdq_onnx import OnnxSummary, export_onnx
from repapq_plugin.job import Job, Report
from repapq_plugin.quantizers.layers import OUTPUT, QuantizedLayer, weight_of
from repapq_plugin.quantizers.skips import SkippingModule
from repapq_plugin.result import Calibrated, CalibrationResult

logger = logging.getLogger(__name__)

SAVED_AS = "repapq.safetensors"
"""Name of the saved calibration in a folder."""


Summary = OnnxSummary | OpenVINOSummary | ExecuTorchSummary | LiteRTSummary | ProgramSummary
"""What an exporter says of the file that it wrote."""


class RunnableNetwork(Protocol):
    """A network in the form in which a host runs it."""

    @property
    def network(self) -> nn.Module:
        """What the host runs: images, float ``(N, C, H, W)``, to the raw outputs."""

    def export(self, kind: str, example: Tensor, path: Path) -> Summary:
        """Write the network for a runtime.

        Args:
            kind: ``'onnx'``, ``'openvino'``, or another kind that the host knows.
            example: Images, float ``(N, C, H, W)``.
            path: File to write, without suffix.

        Raises:
            ExportError: The host has no such export.
        """


class QuantizedNetwork(RunnableNetwork, Protocol):
    """What every host gives back for a network that takes images."""

    @property
    def result(self) -> Calibrated:
        """The record of the calibration."""

    def save(self, folder: Path) -> list[Path]:
        """Write into ``folder`` what brings the network back; return the files."""


@dataclass(frozen=True)
class HostedNetwork:
    """What a host runs, and the calibration that it stands for; a `QuantizedNetwork`.

    Args:
        network: Takes images and returns the raw outputs.
        result: The calibration; its notes say why ``network`` is the simulated one, if it is.
    """

    network: nn.Module
    result: CalibrationResult

    def save(self, folder: Path) -> list[Path]:
        """Write the calibration into ``folder``; return the files."""
        return [self.result.save(folder / SAVED_AS)]

    def export(self, kind: str, example: Tensor, path: Path) -> Summary:
        """Write the calibrated network for a runtime.

        Args:
            kind: ``'onnx'``, ``'openvino'``, ``'executorch'``, ``'litert'``, or ``'program'`` for a file that the last
                two are made of.
            example: Images, float ``(N, C, H, W)``.
            path: File to write, without suffix.

        Raises:
            ExportError: There is no such kind, or see what writes the file.
        """
        if kind == "onnx":
            return export_onnx(self.result, example, path.with_name(f"{path.name}.onnx"))
        if kind == "openvino":
            return export_openvino(self.result, example, path.with_name(f"{path.name}.xml"))
        if kind == "executorch":
            return export_executorch(self.result, example, path.with_name(f"{path.name}.pte"))
        if kind == "litert":
            return export_litert(self.result, example, path.with_name(f"{path.name}.tflite"))
        if kind == "program":
            return quantized_program(self.result, example).save(path.with_name(f"{path.name}.pt2"))
        raise ExportError(f"kind={kind!r} is not allowed; choose onnx, openvino, executorch, litert or program.")


def quantized_layers(network: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the quantized layers of a calibrated network by each module path that they stand at.

    Raises:
        HostError: It holds none, or computes in double precision, or rounds outputs or summands, which the toolbox
            would leave out.
    """
    rounding = next((name for name, module in network.named_modules() if OUTPUT in module._modules), None)
    if rounding is not None:
        raise HostError(
            f"The output of {rounding or 'the network'!r} is rounded, which this toolbox does not carry; quantize for "
            "a target without that, or with this host."
        )
    adding = next((name for name, module in network.named_modules() if isinstance(module, SkippingModule)), None)
    if adding is not None:
        raise HostError(
            f"{adding or 'The network'!r} adds rounded summands, which this toolbox does not carry; quantize for a "
            "target without them."
        )
    named = network.named_modules(remove_duplicate=False)
    layers = {name: module for name, module in named if isinstance(module, QuantizedLayer)}
    if not layers:
        raise HostError(f"{type(network).__name__} holds no quantized layer; quantize it with quantize_model first.")
    double = next((name for name, layer in layers.items() if weight_of(layer).dtype is torch.float64), None)
    if double is not None:
        raise HostError(
            f"{double!r} is in double precision, where this toolbox has no integers; quantize model.float()."
        )
    return layers


HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)


def keep_root_hooks(network: nn.Module, graph: nn.Module) -> None:
    """Let a graph run the forward hooks that hang on the network itself, which tracing leaves out.

    Args:
        network: Was traced, or is a graph that has such hooks.
        graph: What was made of it; changed in place.
    """
    for name in HOOKS:
        getattr(graph, name).update(getattr(network, name))


def converted_or_simulated(
    calibrated: Calibrated, convert: Callable[[nn.Module], tuple[nn.Module, Sequence[str]]]
) -> HostedNetwork:
    """Hand a calibrated network to a host; where the host cannot take it, it stays simulated.

    Args:
        calibrated: A network with the plugin's own quantizers, and its record.
        convert: Returns the host's form of the network and notes on it; raises `HostError` with the reason where it
            cannot.

    Returns:
        The host's form; or the simulated network, with the reason in the notes of the record.
    """
    result = CalibrationResult(**vars(calibrated))
    try:
        network, notes = convert(result.model)
    except HostError as error:
        network, notes = result.model, [f"The network runs simulated: {error}"]
        logger.warning(notes[0])
    return HostedNetwork(network, dataclasses.replace(result, notes=(*result.notes, *notes)))


class Quantize(Protocol):
    """Calibrates a network and hands it to a host; the call that torch.ao and pt2e have in common."""

    def __call__(
        self,
        network: nn.Module,
        images: Sequence[Tensor],
        config: RepAPQConfig,
        progress: Report | None = None,
        options: Mapping[str, object] | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> HostedNetwork:
        """Quantize a copy of ``network``.

        Args:
            network: Takes images, float ``(N, C, H, W)``; not changed.
            images: Calibration batches.
            config: Bits, ranges and calibration.
            progress: Called as the work goes on.
            options: What else the host is told.
            checkpoints: Keeps what is finished.

        Returns:
            The host's form; the simulated network, with the reason in the result's notes, where the host cannot take
            it.

        Raises:
            ConfigError: An option is not allowed.
            CalibrationError: See `quantize_model`.
        """


def quantizing_on(backend: Callable[[Mapping[str, object] | None], Backend[HostedNetwork]]) -> Quantize:
    """Return the call that quantizes on a backend, which is made of the options."""

    def quantize_network(
        network: nn.Module,
        images: Sequence[Tensor],
        config: RepAPQConfig,
        progress: Report | None = None,
        options: Mapping[str, object] | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> HostedNetwork:
        return Job(backend(options), config, report=progress, checkpoints=checkpoints).run(network, images)

    return quantize_network
