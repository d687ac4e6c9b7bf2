"""`quantize`: the call of `nncf.quantize`, and what stands behind it."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import nncf
import torch
from nncf.torch.function_hook import is_wrapped, wrap_model
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph
from torch import nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.errors import ConfigError, HostError
from repapq_plugin.hosts.nncf.calibrate import calibrate
from repapq_plugin.hosts.nncf.data import calibration_items, check_items, forward, joined
from repapq_plugin.job import Progress, counted, merge_for_inference, prepare_channels
from repapq_plugin.quantizers.plan import plan_layers
from repapq_plugin.quantizers.trace import trace_network
from repapq_plugin.result import CalibrationResult

logger = logging.getLogger(__name__)

TARGET_DEVICES = (
    nncf.TargetDevice.ANY,
    nncf.TargetDevice.CPU,
    nncf.TargetDevice.GPU,
    nncf.TargetDevice.NPU,
)
"""Devices that NNCF quantizes PyTorch models for."""

EXTENSION_TIMEOUT = "NNCF_EXTENSION_LOAD_TIMEOUT"


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
        target_device: One of `TARGET_DEVICES`.
        subset_size: How many items of the dataset are used at most.
        fast_bias_correction: Must be true, the only one NNCF has for PyTorch.
        model_type: See `nncf.quantize`.
        ignored_scope: See `nncf.quantize`.
        advanced_parameters: See `nncf.quantize`.
        repapq: Bits, ranges and calibration; default: W8A8. Below 8 bits, codes are carried in NNCF's 8-bit
            quantizers, so that runtimes keep their integer kernels. Activations that no convolution or linear
            layer reads keep 8 bits.

    Raises:
        ConfigError: An argument is not allowed.
        CalibrationError: The dataset is empty or does not fit the model, or nothing can be quantized.
        HostError: NNCF cannot trace or quantize the model.
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
    ).model


def quantize_with_record(
    model: nn.Module,
    calibration_dataset: nncf.Dataset,
    *,
    target_device: nncf.TargetDevice = nncf.TargetDevice.ANY,
    subset_size: int = 300,
    fast_bias_correction: bool = True,
    ignored_scope: nncf.IgnoredScope | None = None,
    repapq: RepAPQConfig | None = None,
    progress: Callable[[Progress], None] | None = None,
    **nncf_arguments: Any,
) -> CalibrationResult:
    """Do what `quantize` does, and return the record of it too.

    Args:
        model: See `quantize`, as for all but the last two.
        calibration_dataset: See there.
        target_device: See there.
        subset_size: See there.
        fast_bias_correction: See there.
        ignored_scope: See there.
        repapq: See there.
        progress: Called as the work goes on.
        **nncf_arguments: ``preset``, ``model_type`` and ``advanced_parameters``.

    Returns:
        The quantized model and what became of every unit. Its ``save`` is not for NNCF's models: keep
        ``nncf.torch.get_config(model)`` and ``model.state_dict()`` instead.
    """
    started = time.perf_counter()
    config = repapq or RepAPQConfig()
    _check(model, target_device, fast_bias_correction, config)
    items = calibration_items(calibration_dataset, subset_size)
    torch_seed = torch.random.get_rng_state()
    try:
        torch.manual_seed(config.seed)
        check_items(copy.deepcopy(model).eval(), items)
        with torch.no_grad():
            teacher, plan, merges, notes = merge_for_inference(model, lambda m: forward(m, items[0]))
            batches = joined(teacher, items)
        trace = trace_network(teacher, lambda: forward(teacher, batches[0]))
        layer_plans, reasons = plan_layers(teacher, trace, config)
        prepare_channels(teacher, lambda batch: forward(teacher, batch), batches, layer_plans, config)
        student = _place(
            teacher,
            batches,
            reasons,
            target_device=target_device,
            subset_size=len(batches),
            fast_bias_correction=fast_bias_correction,
            ignored_scope=ignored_scope,
            **nncf_arguments,
        )
        for parameter in teacher.parameters():
            parameter.requires_grad_(False)
        calibrated = calibrate(
            student, teacher, trace, batches, config, lambda phase, total: counted(phase, total, progress)
        )
    finally:
        torch.random.set_rng_state(torch_seed)
    left = {name: "left float by NNCF" for name in layer_plans if name not in calibrated.layers}
    return CalibrationResult(
        model=student,
        config=config,
        plan=replace(plan, layers=calibrated.layers, float_layers={**reasons, **left}),
        units=calibrated.units,
        merges=merges,
        notes=notes,
        seconds=time.perf_counter() - started,
    )


def _check(
    model: nn.Module, target_device: nncf.TargetDevice, fast_bias_correction: bool, config: RepAPQConfig
) -> None:
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
    if target_device not in TARGET_DEVICES:
        allowed = ", ".join(device.name for device in TARGET_DEVICES)
        raise ConfigError(f"target_device={target_device!r} is not allowed for PyTorch models; choose {allowed}.")
    if fast_bias_correction is not True:
        raise ConfigError(
            f"fast_bias_correction={fast_bias_correction!r} is not allowed for PyTorch models; choose True."
        )


def _place(
    teacher: nn.Module,
    batches: Sequence[Any],
    float_layers: Collection[str],
    ignored_scope: nncf.IgnoredScope | None,
    **arguments: Any,
) -> nn.Module:
    """Let NNCF quantize a copy of ``teacher``, all but ``float_layers``."""
    names: list[str] = []
    try:
        with _time_to_compile():
            operations = _operations(teacher, batches[0])
            names = [name for of_layer in operations.values() for name in of_layer]
            if float_layers:
                ignored_scope = copy.deepcopy(ignored_scope) if ignored_scope is not None else nncf.IgnoredScope()
                ignored_scope.names += [name for layer in float_layers for name in operations.get(layer, ())]
            placed: nn.Module = nncf.quantize(
                teacher, nncf.Dataset(list(batches)), ignored_scope=ignored_scope, **arguments
            )
    except nncf.ValidationError as error:
        raise ConfigError(
            f"{str(error).strip()} Change ignored_scope; names in it are those of the merged model, such as "
            f"{', '.join(names[:3])}."
        ) from error
    except Exception as error:  # whatever a model does that NNCF did not foresee
        raise HostError(
            f"NNCF cannot quantize {type(teacher).__name__}: {type(error).__name__}: {error} Leave out the part that "
            "it cannot trace, or quantize with repapq_plugin.quantize_model, which does not trace."
        ) from error
    return placed


def _operations(model: nn.Module, item: Any) -> dict[str, list[str]]:
    """Return NNCF's names of the operations of each layer, by the layer's module path."""
    graph = build_nncf_graph(wrap_model(copy.deepcopy(model)), item)
    suffix = ".weight"
    return {
        node.node_name.removesuffix(suffix): [reader.node_name for reader in graph.get_next_nodes(node)]
        for node in graph.get_all_nodes()
        if node.node_name.endswith(suffix)
    }


@contextmanager
def _time_to_compile() -> Iterator[None]:
    """Let NNCF compile its kernels, which it does once per machine, for as long as a slow machine takes."""
    before = os.environ.get(EXTENSION_TIMEOUT)
    os.environ.setdefault(EXTENSION_TIMEOUT, "0")
    try:
        yield
    finally:
        if before is None:
            del os.environ[EXTENSION_TIMEOUT]
