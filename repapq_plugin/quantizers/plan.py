"""From a float network to one that carries quantizers: plan, and the network built from the plan.

The plan is plain data. A saved result holds it, so that loading rebuilds the very same structure
without running the network.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.quant_primitives import activation_bounds, weight_bounds
from repapq_plugin.errors import CalibrationError, ConfigError
from repapq_plugin.observers import OBSERVERS
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize, PerChannelLearnableFakeQuantize
from repapq_plugin.quantizers.layers import QuantizedLayer, output_channels_axis
from repapq_plugin.quantizers.trace import LayerTrace, Trace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is quantized.

    Args:
        weight_bits: Bits of its weight.
        activation_bits: Bits of its input.
        input_group: Layers of one group read the same tensor and share its quantizer.
    """

    weight_bits: int
    activation_bits: int
    input_group: int


@dataclass(frozen=True)
class QuantizationPlan:
    """What was folded, and how each layer is quantized.

    Args:
        folded: Pairs (layer, norm) of module paths whose norm went into the layer.
        layers: Quantized layers by module path, in call order.
        float_layers: Layers that stay float, with the reason.
    """

    folded: tuple[tuple[str, str], ...] = ()
    layers: dict[str, LayerPlan] = field(default_factory=dict)
    float_layers: dict[str, str] = field(default_factory=dict)


def plan_layers(model: nn.Module, trace: Trace, config: RepAPQConfig) -> tuple[dict[str, LayerPlan], dict[str, str]]:
    """Decide for every traced layer whether and how it is quantized.

    Returns:
        Plans by layer name in call order, and reasons by the name of each layer that stays float.

    Raises:
        ConfigError: A pattern of ``keep_float`` or ``layer_bits`` matches nothing.
        CalibrationError: Nothing is left to quantize, or weights are not finite.
    """
    modules = dict(model.named_modules())
    _check_patterns(config.keep_float, list(modules), "keep_float")
    _check_patterns(tuple(config.layer_bits), list(trace.layers), "layer_bits")
    plans: dict[str, LayerPlan] = {}
    reasons: dict[str, str] = {}
    groups: dict[tuple[Any, int], int] = {}
    for name, seen in trace.layers.items():
        reason = _reason_for_float(name, modules[name], config)
        if reason:
            reasons[name] = reason
            continue
        _check_weight(name, modules[name])
        weight_bits, activation_bits = layer_bits(seen, config)
        group = groups.setdefault((seen.input_key, activation_bits), len(groups))
        plans[name] = LayerPlan(weight_bits, activation_bits, group)
    if not plans:
        raise CalibrationError(
            "There is nothing to quantize: the network called no convolution or linear layer"
            + (f" but {', '.join(reasons)}, which stay float." if reasons else ".")
        )
    return plans, reasons


def layer_bits(seen: LayerTrace, config: RepAPQConfig) -> tuple[int, int]:
    """Return ``(weight_bits, activation_bits)`` of a layer under ``config``."""
    bits = (config.weight_bits, config.activation_bits)
    if config.first_last_bits is not None and (seen.first or seen.last):
        bits = (config.first_last_bits, config.first_last_bits)
    for pattern, special in config.layer_bits.items():
        if fnmatchcase(seen.name, pattern):
            bits = special
    return config.weight_bits_used(bits[0]), bits[1]


def _reason_for_float(name: str, module: nn.Module, config: RepAPQConfig) -> str:
    if any(fnmatchcase(name, pattern) or fnmatchcase(name, pattern + ".*") for pattern in config.keep_float):
        return "kept float by the configuration"
    if isinstance(module, nn.ConvTranspose2d) and module.groups > 1:
        return "grouped transposed convolution: its weight has no axis of output channels"
    return ""


def _check_weight(name: str, module: nn.Module) -> None:
    weight = cast(nn.Conv2d, module).weight
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise CalibrationError(
            f"The weight of {name!r} is not finite: {bad} of {weight.numel()} values are NaN or Inf. "
            "Check the checkpoint."
        )


def _check_patterns(patterns: tuple[str, ...], names: list[str], key: str) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"{key}: the pattern {pattern!r} matches no module of the merged model.")


def insert_quantizers(
    model: nn.Module, layers: Mapping[str, LayerPlan], config: RepAPQConfig
) -> dict[str, QuantizedLayer]:
    """Replace the planned layers of ``model`` in place by `QuantizedLayer`.

    A layer object that stands at several module paths stays one object.

    Returns:
        The new layers by module path; weights have their starting scales, activations none yet.
    """
    by_group: dict[int, LearnableFakeQuantize] = {}
    replaced: dict[nn.Module, QuantizedLayer] = {}
    for name, plan in layers.items():
        layer = model.get_submodule(name)
        if plan.input_group not in by_group:
            by_group[plan.input_group] = input_quantizer(plan.activation_bits, config)
        quantized = QuantizedLayer(layer, weight_quantizer(layer, plan.weight_bits, config), by_group[plan.input_group])
        if quantized.bias is None:  # calibration corrects means through it, and the fold needs its place
            quantized.layer.bias = nn.Parameter(quantized.weight.new_zeros(quantized.out_channels))
        replaced[layer] = quantized.to(quantized.weight.device).train(layer.training)
    for parent in list(model.modules()):
        if isinstance(parent, QuantizedLayer):
            continue
        for key, child in list(parent.named_children()):
            if child in replaced:
                setattr(parent, key, replaced[child])
    return {name: cast(QuantizedLayer, model.get_submodule(name)) for name in layers}


def input_quantizer(num_bits: int, config: RepAPQConfig) -> LearnableFakeQuantize:
    """Return an activation quantizer with the observer that ``config`` names (MAE for ``auto``)."""
    name = "mae" if config.activation_observer == "auto" else config.activation_observer
    quant_min, quant_max = activation_bounds(num_bits)
    extra: dict[str, Any] = {"percentile": config.percentile} if name == "percentile" else {}
    return LearnableFakeQuantize(
        observer=partial(OBSERVERS[name], **extra),
        dtype=torch.quint8,
        qscheme=torch.per_tensor_affine,
        quant_min=quant_min,
        quant_max=quant_max,
        drop_probability=config.drop_probability,
    )


def weight_quantizer(layer: nn.Module, num_bits: int, config: RepAPQConfig) -> LearnableFakeQuantize:
    """Return a per-channel weight quantizer with its starting scales."""
    quant_min, quant_max = weight_bounds(num_bits)
    quantizer = PerChannelLearnableFakeQuantize(
        observer=OBSERVERS[f"per_channel_{config.weight_observer}"],
        quant_min=quant_min,
        quant_max=quant_max,
        ch_axis=output_channels_axis(layer),
    )
    weight = cast(nn.Conv2d, layer).weight
    quantizer.to(weight.device)
    quantizer.activation_post_process(weight.detach())
    quantizer.initialise_from_observer()
    quantizer.enable_observer(False)
    return quantizer
