"""Calibrating a model that NNCF has quantized, in place: bits, ranges, learning, and few bits carried in 8."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from nncf.torch.function_hook import get_hook_storage
from nncf.torch.function_hook.hook_storage import HookStorage, decode_hook_name
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph
from torch import Tensor, nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.errors import CalibrationError, ConfigError
from repapq_plugin.hosts.nncf.affine import attach_affine, can_take_affine, fold_affine, put_first
from repapq_plugin.hosts.nncf.data import forward
from repapq_plugin.hosts.nncf.learners import ActivationLearner, WeightLearner
from repapq_plugin.hosts.nncf.placement import Placement, find_placement
from repapq_plugin.hosts.nncf.quantizers import (
    CARRIER_BITS,
    carry,
    channel_axis,
    in_logarithms,
    set_num_bits,
    set_qparams,
    step_of,
)
from repapq_plugin.hosts.nncf.ranges import set_activation_ranges, set_weight_range, uses_half_range
from repapq_plugin.hosts.nncf.running import counting_skipped, run_alone, watch_calls
from repapq_plugin.method.across_block import AcrossBlockCalibrator, Networks, total_steps
from repapq_plugin.method.cache import ActivationCache
from repapq_plugin.method.learners import Learner
from repapq_plugin.method.partition import Stage, find_stages, find_units
from repapq_plugin.quantizers.layers import ChannelAffine
from repapq_plugin.quantizers.plan import LayerPlan, layer_bits
from repapq_plugin.quantizers.trace import Trace
from repapq_plugin.result import UnitResult

logger = logging.getLogger(__name__)

HALF_RANGE_BITS = CARRIER_BITS - 1
"""Bits of a weight half of whose codes stay unused."""


@dataclass(frozen=True)
class Calibrated:
    """What a calibration in place did.

    Args:
        units: One entry per unit, in call order; empty where nothing was learned.
        layers: How each layer is quantized, by module path; the group is the activation quantizer's number.
    """

    units: tuple[UnitResult, ...]
    layers: dict[str, LayerPlan]


def calibrate(
    student: nn.Module,
    teacher: nn.Module,
    trace: Trace,
    batches: Sequence[Any],
    config: RepAPQConfig,
    counter: Callable[[str, int], Callable[[], None]],
) -> Calibrated:
    """Calibrate a model that `nncf.quantize` returned, in place.

    NNCF's choice of what is quantized, its signs and its shared quantizers stay. Weights and inputs of layers get
    the bits of ``config``; activations that no layer reads keep 8.

    Args:
        student: The model, in evaluation mode.
        teacher: The float model it was made from, with the same module paths.
        trace: What a forward pass of the teacher showed.
        batches: Calibration batches, as `forward` takes them.
        config: Bits, ranges and calibration.
        counter: ``counter(phase, total)`` returns what is called after each of ``total`` parts.

    Raises:
        CalibrationError: No layer is quantized, or activations are not finite.
        ConfigError: The configuration asks for what NNCF's quantizers cannot do.
    """
    if config.drop_probability:
        raise ConfigError(
            f"drop_probability={config.drop_probability} is not allowed with NNCF, whose quantizers drop nothing; "
            "choose 0."
        )

    def run(batch: Any) -> Any:
        return forward(student, batch)

    trained = [(parameter, parameter.requires_grad) for parameter in student.parameters()]
    for parameter, _ in trained:
        parameter.requires_grad_(False)
    placement = find_placement(student, build_nncf_graph(student, batches[0]), lambda: run(batches[0]))
    if not placement.weights:
        raise CalibrationError("NNCF quantized no convolution or linear layer; widen what ignored_scope leaves.")
    plans = set_bits(placement, trace, config)
    for placed in placement.weights.values():
        set_weight_range(placed, config)
    set_activation_ranges(placement, run, batches, config, counter("ranges", len(batches)))
    units: tuple[UnitResult, ...] = ()
    if config.steps:
        found = find_units(teacher, trace, placement.weights, config.units)
        stages = find_stages(teacher, trace, found, config.stages)
        advance = counter("calibration", total_steps(stages, config))
        units = _learn(student, teacher, trace, batches, config, placement, stages, advance)
    carry_few_bits(student, placement)
    for parameter, required in trained:
        parameter.requires_grad_(required)
    return Calibrated(units, plans)


def set_bits(placement: Placement, trace: Trace, config: RepAPQConfig) -> dict[str, LayerPlan]:
    """Give weights and the quantizers in front of layers their bits, over the ranges they have.

    Args:
        placement: Where NNCF's quantizers of 8 bits are.
        trace: What a forward pass of the float network showed.
        config: Says the bits.

    Returns:
        How each layer is quantized, by module path.
    """
    plans: dict[str, LayerPlan] = {}
    for name, placed in placement.weights.items():
        weight_bits, _ = layer_bits(trace.layers[name], config)
        if uses_half_range(placed):
            step = step_of(placed.quantizer)
            set_num_bits(placed.quantizer, HALF_RANGE_BITS)
            set_qparams(placed.quantizer, step, torch.zeros_like(step))
            weight_bits = min(weight_bits, HALF_RANGE_BITS)
        set_num_bits(placed.quantizer, weight_bits)
        plans[name] = LayerPlan(weight_bits, CARRIER_BITS, -1)
    for group, activation in enumerate(placement.activations):
        if not activation.readers or channel_axis(activation.quantizer) is not None:
            continue
        # Layers that read the same tensor share its quantizer: the one that needs most bits decides.
        bits = max(layer_bits(trace.layers[name], config)[1] for name in activation.readers)
        set_num_bits(activation.quantizer, bits)
        for name in activation.readers:
            plans[name] = replace(plans[name], activation_bits=bits, input_group=group)
    return plans


def _learn(
    student: nn.Module,
    teacher: nn.Module,
    trace: Trace,
    batches: Sequence[Any],
    config: RepAPQConfig,
    placement: Placement,
    stages: Sequence[Stage],
    advance: Callable[[], None],
) -> tuple[UnitResult, ...]:
    affines: dict[str, ChannelAffine] = {}
    if config.affine:
        # A weight that two layers share cannot take two affine layers in.
        owners = Counter(id(parameter) for placed in placement.weights.values() for parameter in _own(placed.module))
        affines = {
            name: attach_affine(student, placed)
            for name, placed in placement.weights.items()
            if can_take_affine(placed) and all(owners[id(parameter)] == 1 for parameter in _own(placed.module))
        }
    learners: dict[str, Learner] = {
        name: WeightLearner(placed.module, placed.quantizer, affines.get(name))
        for name, placed in placement.weights.items()
    }
    for placed in placement.activations:
        # The name of the hook makes the path unique; what counts is the module that it begins with.
        learners[f"{placed.inside}.{placed.hooks[0]}"] = ActivationLearner(placed.quantizer)
    names = {stage.name for stage in stages} | {unit.name for stage in stages for unit in stage.units}
    calls = watch_calls(student, names, lambda: forward(student, batches[0]))

    def call_alone(name: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        return run_alone(student, name, inputs, calls[name])

    networks = Networks(student, teacher, learners, trace, batches, forward, call_alone)
    with ExitStack() as stack:
        stack.enter_context(in_logarithms(placement.quantizers))
        stack.enter_context(counting_skipped(student, calls))
        cache = stack.enter_context(ActivationCache(config.cache_bytes))
        calibrator = AcrossBlockCalibrator(networks, stages, config, cache, advance)
        units = tuple(calibrator.run())
    for name, affine in affines.items():
        fold_affine(student, placement.weights[name], affine)
    for quantizer in placement.quantizers:
        # A stage that could not be run alone was switched off; as NNCF's own result it still is quantized.
        quantizer.enabled.fill_(1)
    return units


def _own(layer: nn.Module) -> list[nn.Parameter]:
    return list(layer.parameters(recurse=False))


@torch.no_grad()
def carry_few_bits(model: nn.Module, placement: Placement) -> None:
    """Turn every quantizer of few bits into one of 8 that makes the same codes."""
    storage = get_hook_storage(model)
    for placed in placement.weights.values():
        weight: Tensor = placed.module.weight  # type: ignore[assignment]
        if placed.quantizer.num_bits < CARRIER_BITS:
            weight.copy_(placed.quantizer.quantize(weight))
        carry(placed.quantizer)
    for activation in placement.activations:
        clamp = carry(activation.quantizer)
        if clamp is None:
            continue
        for hook in activation.hooks:
            kind, operation, port = decode_hook_name(hook)
            put_first(getattr(storage, kind), HookStorage._generate_key(operation, port), clamp)
