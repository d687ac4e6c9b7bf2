"""NNCF for hosts that hand over a network and prepared images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TypeVar

import nncf
import nncf.torch
import torch
from torch import Tensor, nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.checkpoints import Checkpoints
from repapq_plugin.core.files import atomically
from repapq_plugin.core.tensors import tensors_of
from repapq_plugin.core.unpickling import StandIns, load_plain
from repapq_plugin.errors import ConfigError, ExportError, HostError
from repapq_plugin.export.onnx_verify import relative_difference
from repapq_plugin.export.openvino import OpenVINOSummary, layer_kernels, require_openvino, written_whole
from repapq_plugin.hosts.nncf._compat import QuantizationScheme
from repapq_plugin.hosts.nncf.backend import NNCFBackend, NNCFOptions
from repapq_plugin.hosts.nncf.data import forward
from repapq_plugin.hosts.nncf.quantization import check, on_device
from repapq_plugin.job import Job, Report
from repapq_plugin.merging import merge_for_inference
from repapq_plugin.result import Calibrated

STATE_FILE = "nncf.pth"
"""Holds ``config`` for `nncf.torch.load_from_config` and ``state_dict``."""

OPTIONS = ("target_device", "preset", "model_type")
"""Arguments of `nncf.quantize` that a config gives by the name of an enum's member."""

ALLOWED = ("nncf.*", "repapq_plugin.*")
"""Modules whose classes a saved state may name."""

MEMBERS: StandIns = {f"{QuantizationScheme.__module__}.{QuantizationScheme.__qualname__}": QuantizationScheme}
"""Enums whose members NNCF's configuration holds, by the name that stands in a file."""

E = TypeVar("E", bound=Enum)


@dataclass(frozen=True)
class NNCFNetwork:
    """A network that NNCF quantized, and the record of it."""

    result: Calibrated

    @property
    def network(self) -> nn.Module:
        """The quantized network."""
        return self.result.model

    def save(self, folder: Path) -> list[Path]:
        """Write `STATE_FILE`, whole or not at all.

        Raises:
            ExportError: It cannot be written.
        """
        path = folder / STATE_FILE
        state = {"config": nncf.torch.get_config(self.network), "state_dict": self.network.state_dict()}
        try:
            with atomically(path) as partial:
                torch.save(state, partial)
        except (OSError, RuntimeError) as error:
            raise ExportError(f"Cannot write {path}: {error}.") from error
        return [path]

    def export(self, kind: str, example: Tensor, path: Path) -> OpenVINOSummary:
        """Write an OpenVINO IR, and run it once on ``example``.

        Raises:
            ExportError: ``kind`` is not ``'openvino'``, or the network cannot be converted or written.
        """
        return export_network(self.network, kind, example, path)


@dataclass(frozen=True)
class LoadedNetwork:
    """What `load` brought back: the network without its record."""

    network: nn.Module

    def export(self, kind: str, example: Tensor, path: Path) -> OpenVINOSummary:
        """Write an OpenVINO IR; see `export_network`."""
        return export_network(self.network, kind, example, path)


def load(path: str | Path, merged_model: nn.Module) -> nn.Module:
    """Bring back what `NNCFNetwork.save` wrote, without running anything that stands in the file.

    Args:
        path: The file.
        merged_model: The float network that was quantized, branches merged and norms folded (see
            `repapq_plugin.merging.merge_for_inference`); its weights do not matter. It is changed.

    Returns:
        The quantized network, in evaluation mode.

    Raises:
        HostError: The file is missing, holds more than plain data, names classes that are not NNCF's or this package's,
            or belongs to another network.
    """
    try:
        saved = load_plain(path, str(path), "Quantize again to make a new one.", MEMBERS)
    except FileNotFoundError as error:
        raise HostError(f"{path} does not exist.") from error
    if not isinstance(saved, Mapping) or not {"config", "state_dict"} <= saved.keys():
        raise HostError(f"{path} is no saved state of NNCF's; give what NNCFNetwork.save wrote ({STATE_FILE}).")
    try:
        restored: nn.Module = nncf.torch.load_from_config(merged_model, saved["config"], allowed_modules=ALLOWED)
        restored.load_state_dict(saved["state_dict"])
    except Exception as error:  # NNCF builds what the file says, and checks little of it.
        raise HostError(
            f"{path} does not fit {type(merged_model).__name__}: {error}. Load it into the model it was made from."
        ) from error
    return restored.eval()


def load_network(path: Path, network: nn.Module, example: Tensor) -> LoadedNetwork:
    """Bring back what `quantize_network` made of ``network`` and saved.

    Args:
        path: The file that was saved.
        network: As it was given to `quantize_network`; its weights do not matter, and it is not changed.
        example: Images, float ``(N, C, H, W)``, that show how it is put together.

    Raises:
        HostError: See `load`.
    """
    with torch.no_grad():
        merged = merge_for_inference(network, lambda model: model(example)).network
    return LoadedNetwork(load(path, merged))


def export_network(network: nn.Module, kind: str, example: Tensor, path: Path) -> OpenVINOSummary:
    """Write a network that NNCF quantized as OpenVINO IR, and run it once.

    Args:
        network: Images to tensors.
        kind: ``'openvino'``.
        example: Images, float ``(N, C, H, W)``.
        path: File to write, without suffix.

    Raises:
        ExportError: ``kind`` is another, or the network cannot be converted or written.
    """
    if kind != "openvino":
        raise ExportError(
            f"NNCF's networks are exported to OpenVINO, not to {kind}; choose export='openvino', or the plugin's "
            "own quantizers."
        )
    ov = require_openvino()
    target = path.with_name(path.name + ".xml")
    with torch.no_grad():
        expected = tensors_of(network(example))
    try:
        with written_whole(target) as partial:
            ov.save_model(ov.convert_model(network, example_input=example), partial, compress_to_fp16=False)
            compiled = ov.Core().compile_model(partial, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            results = compiled(example.cpu().numpy())
    except (RuntimeError, OSError) as error:
        raise ExportError(f"OpenVINO cannot convert NNCF's network: {error}") from error
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
    progress: Report | None,
    options: Mapping[str, object],
    checkpoints: Checkpoints | None = None,
) -> NNCFNetwork:
    """Quantize a network on prepared images with NNCF's placement.

    Args:
        network: Images to tensors; not changed.
        images: Calibration batches, float ``(N, C, H, W)``.
        config: Bits, ranges and calibration.
        progress: Called as the work goes on.
        options: ``target_device``, ``preset`` and ``model_type`` of `nncf.quantize`, by name.
        checkpoints: Keeps what is finished.

    Raises:
        ConfigError: An option is not allowed; and see `quantize`.
    """
    for key in options:
        if key not in OPTIONS:
            raise ConfigError(
                f"quantizer.options.{key} is not a key of the NNCF host; known keys: {', '.join(OPTIONS)}."
            )
    told = NNCFOptions(
        preset=_member(nncf.QuantizationPreset, "preset", options),
        target_device=_member(nncf.TargetDevice, "target_device", options) or nncf.TargetDevice.ANY,
        model_type=_member(nncf.ModelType, "model_type", options),
    )
    check(network, told, config)
    config = on_device(config, told.target_device)
    return NNCFNetwork(Job(NNCFBackend(told), config, forward, progress, checkpoints).run(network, images))


def _member(kind: type[E], key: str, options: Mapping[str, object]) -> E | None:
    """Return the member of an enum that an option names; ``None`` where it is not given."""
    if key not in options:
        return None
    name, names = str(options[key]).upper(), [member.name for member in kind]
    if name not in names:
        raise ConfigError(f"quantizer.options.{key}={options[key]!r} is not allowed; choose one of {', '.join(names)}.")
    return kind[name]
