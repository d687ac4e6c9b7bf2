"""From a float network to one that carries quantizers: plan, and the network built from the plan.

The plan is plain data. A saved result holds it, so that loading rebuilds the very same structure
without running the network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.quant_primitives import activation_bounds, weight_bounds
from repapq_plugin.errors import CalibrationError
from repapq_plugin.policy import bits_of, check_names, reason_for_float
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize, PerChannelLearnableFakeQuantize
from repapq_plugin.quantizers.layers import (
    QUANTIZABLE,
    QuantizedLayer,
    bias_of,
    output_channels,
    output_channels_axis,
    quantize_layer,
    weight_of,
)
from repapq_plugin.quantizers.trace import InputKey, Trace


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is quantized.

    Args:
        weight_bits: Bits of its weight.
        activation_bits: Bits of its input.
        input_group: Layers of one group read the same tensor and share its quantizer; ``None``: no quantizer
            of its own stands in front of the layer.
    """

    weight_bits: int
    activation_bits: int
    input_group: int | None

    @property
    def bits(self) -> tuple[int, int]:
        """``(weight_bits, activation_bits)``."""
        return self.weight_bits, self.activation_bits


@dataclass(frozen=True)
class SkipPlan:
    """How what is added to the output of a module is quantized.

    Args:
        adding: Module path of what adds; empty for the whole network.
        layer: Module path of the layer whose output it is added to.
        bits: Bits of the other summand.
        input_group: Layers of this group read it too and lend their quantizer; ``None``: it has its own.
    """

    adding: str
    layer: str
    bits: int
    input_group: int | None


@dataclass(frozen=True)
class OutputPlan:
    """How what a module gives is quantized.

    Args:
        layers: Module paths of the layers whose outputs it gives.
        bits: Bits of them.
        input_group: Layers of this group read it too and lend their quantizer; ``None``: it has its own.
    """

    layers: tuple[str, ...]
    bits: int
    input_group: int | None


@dataclass(frozen=True)
class QuantizationPlan:
    """What was folded, and how each layer is quantized.

    Args:
        folded: Pairs (layer, norm) of module paths whose norm went into the layer.
        baked: Layers whose weight became what their own forward had made of it.
        layers: Quantized layers by module path, in call order.
        float_layers: Layers that stay float, with the reason.
        skips: How other summands are quantized, by the path of the module to whose output they are added.
        outputs: How outputs are quantized that not only quantized layers read, by the path of what gives them.
    """

    folded: tuple[tuple[str, str], ...] = ()
    layers: dict[str, LayerPlan] = field(default_factory=dict)
    float_layers: dict[str, str] = field(default_factory=dict)
    baked: tuple[str, ...] = ()
    skips: dict[str, SkipPlan] = field(default_factory=dict)
    outputs: dict[str, OutputPlan] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Return plain values; skips and outputs go unsaid where there are none."""
        values = dataclasses.asdict(self)
        return {key: value for key, value in values.items() if key not in ("skips", "outputs") or value}


def plan_layers(model: nn.Module, trace: Trace, config: RepAPQConfig) -> tuple[dict[str, LayerPlan], dict[str, str]]:
    """Decide for every traced layer whether and how it is quantized, by the one policy of all hosts.

    Returns:
        Plans by layer name in call order, and reasons by the name of each layer that stays float.

    Raises:
        ConfigError: A pattern of the configuration matches nothing.
        CalibrationError: Nothing is left to quantize, or weights are not finite.
    """
    modules = dict(model.named_modules())
    check_names(config, modules, trace.layers)
    plans: dict[str, LayerPlan] = {}
    reasons: dict[str, str] = {}
    groups: dict[tuple[InputKey, int], int] = {}
    for name, seen in trace.layers.items():
        reason = reason_for_float(name, modules[name], config) or trace.unfit.get(name, "")
        if reason:
            reasons[name] = reason
            continue
        _check_weight(name, modules[name])
        weight_bits, activation_bits = bits_of(name, seen.at_an_end, config)
        group = groups.setdefault((seen.input_key, activation_bits), len(groups))
        plans[name] = LayerPlan(weight_bits, activation_bits, group)
    plans = with_equal_bits_of_equal_weights(plans, modules)
    if not plans:
        raise CalibrationError(_nothing_to_quantize(modules, reasons))
    rest = {name: _why(module) for name, module in modules.items() if name not in trace.layers and _weighs(module)}
    return plans, reasons | rest


def _nothing_to_quantize(modules: Mapping[str, nn.Module], reasons: Mapping[str, str]) -> str:
    told = "There is nothing to quantize: the network called no convolution or linear layer"
    if reasons:
        names: dict[str, list[str]] = {}
        for name, reason in reasons.items():
            names.setdefault(reason, []).append(name)
        return f"{told} but " + "; ".join(f"{', '.join(each)}, which stay float ({why})" for why, each in names.items())
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules.values()):
        return f"{told}. A script hides its layers; give the module that it was made from."
    if any(isinstance(module, QUANTIZABLE) for module in modules.values()):
        return (
            f"{told} of its own. Where a function in it (a lambda, a nested def) keeps the model in a variable, a copy "
            "calls the layers of the first model; make it a method."
        )
    if any(isinstance(module, torch.fx.GraphModule) for module in modules.values()):
        return f"{told}. A graph holds operations in place of layers; give the module that it was made from."
    return f"{told}."


def with_equal_bits_of_equal_weights(
    plans: dict[str, LayerPlan], modules: Mapping[str, nn.Module]
) -> dict[str, LayerPlan]:
    """Give layers that share a weight one number of bits for it: the one that needs most decides."""
    bits: dict[int, int] = {}
    for name, plan in plans.items():
        weight = id(weight_of(modules[name]))
        bits[weight] = max(plan.weight_bits, bits.get(weight, 0))
    return {name: replace(plan, weight_bits=bits[id(weight_of(modules[name]))]) for name, plan in plans.items()}


def _weighs(module: nn.Module) -> bool:
    """Whether a module holds a matrix of weights of its own; scales and shifts of a norm are none."""
    own = module.parameters(recurse=False)
    return isinstance(module, QUANTIZABLE) or any(sum(size > 1 for size in weight.shape) >= 2 for weight in own)


def _why(module: nn.Module) -> str:
    if isinstance(module, QUANTIZABLE):
        return "not called in a forward pass; if its weight is used by a function, that runs in float"
    return f"{type(module).__name__} runs in float"


def _check_weight(name: str, layer: nn.Module) -> None:
    weight = cast(Tensor, layer.weight)
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise CalibrationError(
            f"The weight of {name!r} is not finite: {bad} of {weight.numel()} values are NaN or Inf. "
            "Check the checkpoint."
        )


def insert_quantizers(
    model: nn.Module, layers: Mapping[str, LayerPlan], config: RepAPQConfig
) -> dict[str, QuantizedLayer]:
    """Let the planned layers of ``model`` be `QuantizedLayer`, in place.

    Layers that share a weight share its quantizer.

    Returns:
        The layers by module path; none of their quantizers has its scale yet, none observes, and no scale requires a
        gradient.
    """
    by_group: dict[int | None, LearnableFakeQuantize] = {}
    by_weight: dict[int, LearnableFakeQuantize] = {}
    quantized: dict[str, QuantizedLayer] = {}
    for name, plan in layers.items():
        layer = model.get_submodule(name)
        if plan.input_group not in by_group:
            by_group[plan.input_group] = input_quantizer(plan.activation_bits, config)
        weight = weight_of(layer)
        of_weight = by_weight.setdefault(id(weight), weight_quantizer(layer, plan.weight_bits, config))
        if bias_of(layer) is None:  # calibration corrects means through it, and the fold needs its place
            layer.bias = nn.Parameter(weight.new_zeros(output_channels(layer)), requires_grad=weight.requires_grad)
        for quantizer in (of_weight, by_group[plan.input_group]):
            quantizer.enable_observer(False)
            quantizer.to(weight.device).eval().requires_grad_(False)  # optimising turns on what learns, and off again
        quantized[name] = quantize_layer(layer, of_weight, by_group[plan.input_group])
    return quantized


def input_quantizer(num_bits: int, config: RepAPQConfig) -> LearnableFakeQuantize:
    """Return an activation quantizer on the grid of the target, its scale not yet found."""
    target = config.runs_on
    quant_min, quant_max = activation_bounds(num_bits, signed=target.signed_activations)
    return LearnableFakeQuantize(
        dtype=torch.qint8 if target.signed_activations else torch.quint8,
        qscheme=torch.per_tensor_symmetric if target.symmetric_activations else torch.per_tensor_affine,
        quant_min=quant_min,
        quant_max=quant_max,
        drop_probability=config.drop_probability,
        power_of_two=target.power_of_two_scales,
    )


def weight_quantizer(layer: nn.Module, num_bits: int, config: RepAPQConfig) -> LearnableFakeQuantize:
    """Return a weight quantizer on the grid of the target, its scales not yet found."""
    target = config.runs_on
    quant_min, quant_max = weight_bounds(num_bits)
    powers = target.power_of_two_scales
    if target.weights_per_channel:
        return PerChannelLearnableFakeQuantize(
            quant_min=quant_min, quant_max=quant_max, ch_axis=output_channels_axis(layer), power_of_two=powers
        )
    return LearnableFakeQuantize(
        dtype=torch.qint8,
        qscheme=torch.per_tensor_symmetric,
        quant_min=quant_min,
        quant_max=quant_max,
        power_of_two=powers,
    )
