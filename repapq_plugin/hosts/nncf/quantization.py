"""`quantize`: the call of `nncf.quantize`, and what stands behind it."""

from __future__ import annotations

from pathlib import Path

import nncf
import torch
from torch import nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.ranked_checkpoints import checkpoints_in
from repapq_plugin.errors import ConfigError, HostError
from repapq_plugin.hosts.nncf._compat import is_wrapped
from repapq_plugin.hosts.nncf.backend import NNCFBackend, NNCFOptions
from repapq_plugin.hosts.nncf.data import calibration_items, forward
from repapq_plugin.job import Job, Report
from repapq_plugin.result import Calibrated
from repapq_plugin.targets.target import GENERIC

TARGET_OF = {
    nncf.TargetDevice.ANY: GENERIC,
    nncf.TargetDevice.CPU: "openvino",
    nncf.TargetDevice.GPU: "openvino",
    nncf.TargetDevice.NPU: "openvino",
}
"""Which of our targets each device is that NNCF quantizes PyTorch models for: OpenVINO runs all of its files."""

TARGET_DEVICES = tuple(TARGET_OF)
"""Devices that NNCF quantizes PyTorch models for; ``CPU_SPR`` is not among them (NNCF 3.4 refuses it)."""


def quantize(
    model: nn.Module,
    calibration_dataset: nncf.Dataset,
    *,
    preset: nncf.QuantizationPreset | None = None,
    target_device: nncf.TargetDevice = nncf.TargetDevice.ANY,
    subset_size: int = 300,
    fast_bias_correction: bool = True,
    model_type: nncf.ModelType | None = None,
    ignored_scope: nncf.IgnoredScope | None = None,
    advanced_parameters: nncf.AdvancedQuantizationParameters | None = None,
    repapq: RepAPQConfig | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
) -> nn.Module:
    """Quantize a model as `nncf.quantize` does, and calibrate the result across blocks.

    Branches are merged and channels equalized on a copy; NNCF decides what is quantized, and how; then weights,
    biases and NNCF's own ranges learn from the float model. What comes back is what `nncf.quantize` returns:
    ``openvino.convert_model``, ``nncf.strip``, ``nncf.torch.get_config`` and further training take it.

    Names in ``ignored_scope`` are NNCF's for the merged model, such as ``stem/conv/conv2d/0``; layers are left float
    by their module paths with ``keep_float`` of ``repapq``.

    Args:
        model: Any float model, branched or merged; it is not changed.
        calibration_dataset: Some hundred samples; items of few samples are joined where the model allows.
        preset: See `nncf.quantize`, as for the next six.
        target_device: One of `TARGET_DEVICES`. Where ``repapq`` names no target, the one that the device stands for
            (`TARGET_OF`) is in the record.
        subset_size: How many items of the dataset are used at most.
        fast_bias_correction: Must be true, the only one NNCF has for PyTorch.
        model_type: See `nncf.quantize`.
        ignored_scope: See `nncf.quantize`.
        advanced_parameters: See `nncf.quantize`.
        repapq: Bits, ranges and calibration; default: W8A8. Below 8 bits, codes are carried in NNCF's 8-bit
            quantizers, so that runtimes keep their integer kernels. Activations that no convolution or linear
            layer reads keep 8 bits.
        checkpoint_dir: Folder that keeps each part that is finished; see `repapq_plugin.quantize_model`.
        resume: Go on with what it keeps.

    Raises:
        ConfigError: An argument is not allowed.
        CalibrationError: The dataset is empty or does not fit the model, or nothing can be quantized.
        HostError: NNCF cannot trace or quantize the model.
        CheckpointError: ``checkpoint_dir`` cannot be used, or holds another calibration.
    """
    return quantize_with_record(
        model,
        calibration_dataset,
        preset=preset,
        target_device=target_device,
        subset_size=subset_size,
        fast_bias_correction=fast_bias_correction,
        model_type=model_type,
        ignored_scope=ignored_scope,
        advanced_parameters=advanced_parameters,
        repapq=repapq,
        checkpoint_dir=checkpoint_dir,
        resume=resume,
    ).model


def quantize_with_record(
    model: nn.Module,
    calibration_dataset: nncf.Dataset,
    *,
    subset_size: int = 300,
    repapq: RepAPQConfig | None = None,
    progress: Report | None = None,
    preset: nncf.QuantizationPreset | None = None,
    target_device: nncf.TargetDevice = nncf.TargetDevice.ANY,
    fast_bias_correction: bool = True,
    model_type: nncf.ModelType | None = None,
    ignored_scope: nncf.IgnoredScope | None = None,
    advanced_parameters: nncf.AdvancedQuantizationParameters | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
) -> Calibrated:
    """Do what `quantize` does, and return the record of it too.

    Args:
        model: See `quantize`, as for all but ``progress``.
        calibration_dataset: See there.
        subset_size: See there.
        repapq: See there.
        progress: Called as the work goes on.
        preset: See there.
        target_device: See there.
        fast_bias_correction: See there.
        model_type: See there.
        ignored_scope: See there.
        advanced_parameters: See there.
        checkpoint_dir: See there.
        resume: See there.

    Returns:
        The quantized model and what became of every unit. To keep the model, keep ``nncf.torch.get_config(model)``
        and ``model.state_dict()``.
    """
    options = NNCFOptions(preset, target_device, fast_bias_correction, model_type, ignored_scope, advanced_parameters)
    config = repapq or RepAPQConfig()
    check(model, options, config)
    config = on_device(config, target_device)
    checkpoints = checkpoints_in(checkpoint_dir, resume)
    items = calibration_items(calibration_dataset, subset_size)
    return Job(NNCFBackend(options), config, forward, progress, checkpoints).run(model, items)


def check(model: nn.Module, options: NNCFOptions, config: RepAPQConfig) -> None:
    """Refuse a model that NNCF cannot trace, and arguments that it does not take.

    Raises:
        HostError: The model is a graph or a script, or carries NNCF's hooks already.
        ConfigError: An argument is not allowed.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.fx.GraphModule):
        raise HostError(
            f"NNCF cannot trace a {type(model).__name__} by its modules; give the torch.nn.Module it was made from."
        )
    scripted = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripted:
        raise HostError(
            f"NNCF cannot trace {scripted[0] or 'the model'!r}, which is a script or a trace; give the torch.nn.Module "
            "it was made from."
        )
    if is_wrapped(model):
        raise HostError("The model carries NNCF's hooks already; give the float model that it was made from.")
    if not isinstance(config, RepAPQConfig):
        raise ConfigError(f"repapq={config!r} is not allowed; choose a RepAPQConfig.")
    if options.target_device not in TARGET_DEVICES:
        allowed = ", ".join(device.name for device in TARGET_DEVICES)
        raise ConfigError(
            f"target_device={options.target_device!r} is not allowed for PyTorch models; choose {allowed}."
        )
    if options.fast_bias_correction is not True:
        raise ConfigError(
            f"fast_bias_correction={options.fast_bias_correction!r} is not allowed for PyTorch models; choose True."
        )


def on_device(config: RepAPQConfig, device: nncf.TargetDevice) -> RepAPQConfig:
    """Return a configuration that names the target of a device, unless it names one already.

    Args:
        config: Bits, ranges and calibration.
        device: One of `TARGET_DEVICES`.
    """
    return config.replace(target=TARGET_OF[device]) if config.target == GENERIC else config
