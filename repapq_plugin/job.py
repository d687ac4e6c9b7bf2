"""`quantize_model`: the way in for any network."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from repapq_plugin.conditioning.constant_channels import fold_constant_channels
from repapq_plugin.conditioning.equalize import equalize_channels
from repapq_plugin.config import RepAPQConfig
from repapq_plugin.errors import CalibrationError
from repapq_plugin.method.across_block import AcrossBlockCalibrator, Networks, total_steps
from repapq_plugin.method.cache import ActivationCache
from repapq_plugin.method.learners import LayerLearner
from repapq_plugin.method.partition import find_stages, find_units
from repapq_plugin.method.qpr import attach_affine, fold_affine
from repapq_plugin.method.starting_ranges import set_starting_ranges
from repapq_plugin.quantizers.layers import QuantizedLayer
from repapq_plugin.quantizers.plan import QuantizationPlan, insert_quantizers, plan_layers
from repapq_plugin.quantizers.trace import trace_network
from repapq_plugin.reparam.by_algebra.unknown import find_unknown_multibranch
from repapq_plugin.reparam.fold import fold_conv_norm_pairs
from repapq_plugin.reparam.merge import MergeRecord, merge_branches
from repapq_plugin.reparam.parametrized import bake_parametrizations
from repapq_plugin.result import CalibrationResult, UnitResult

logger = logging.getLogger(__name__)

ForwardFn = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Progress:
    """How far a calibration is.

    Args:
        phase: ``"ranges"`` or ``"calibration"``.
        done: Batches observed, or optimisation steps taken.
        total: How many there will be.
    """

    phase: str
    done: int
    total: int


def counted(phase: str, total: int, report: Callable[[Progress], None] | None) -> Callable[[], None]:
    """Return what turns its calls into `Progress` reports; the first is made at once."""
    done = -1

    def advance() -> None:
        nonlocal done
        done += 1
        if report is not None:
            report(Progress(phase, done, total))

    advance()
    return advance


def call_model(model: nn.Module, batch: Any) -> Any:
    """Run ``model`` on a batch the usual way: a tensor, ``(inputs, ...)``, or a dict of keywords."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(batch[0])
    return model(batch)


def quantize_model(
    model: nn.Module,
    data: Iterable[Any],
    config: RepAPQConfig | None = None,
    *,
    forward_fn: ForwardFn | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> CalibrationResult:
    """Merge, quantize and calibrate a copy of ``model``.

    Args:
        model: Any float network, branched or merged, on any device; it is not changed.
        data: Batches for calibration, a few hundred samples in all; what a batch is only
            ``forward_fn`` knows. They are kept for the time of the calibration.
        config: Bits, ranges and calibration; default: W8A8.
        forward_fn: ``forward_fn(model, batch)`` runs one batch up to the tensors that matter (a
            detector's raw outputs); default: `call_model`.
        progress: Called as the work goes on.

    Returns:
        The quantized network and the record of how it came about.

    Raises:
        CalibrationError: ``data`` is empty, activations are not finite, or nothing can be quantized.
        ConfigError: A pattern of ``config`` matches nothing.
    """
    started = time.perf_counter()
    config = config or RepAPQConfig()
    forward = forward_fn or call_model
    batches = list(data)
    if not batches:
        raise CalibrationError("The calibration data holds no batch; give at least one.")
    torch_seed = torch.random.get_rng_state()
    try:
        torch.manual_seed(config.seed)
        with torch.no_grad():
            teacher, plan, merges, notes = merge_for_inference(model, lambda m: forward(m, batches[0]))
        result = _quantize_merged(teacher, plan, batches, config, forward, progress)
    finally:
        torch.random.set_rng_state(torch_seed)
    return replace(result, merges=merges, notes=notes, seconds=time.perf_counter() - started)


def merge_for_inference(
    model: nn.Module, run: Callable[[nn.Module], Any]
) -> tuple[nn.Module, QuantizationPlan, tuple[MergeRecord, ...], tuple[str, ...]]:
    """Return a copy of ``model`` in evaluation mode with branches merged and norms folded.

    Args:
        model: Any float network; not changed.
        run: Makes one forward pass of a network like ``model``.

    Returns:
        The merged copy, a plan that so far says what was merged and folded, a record per
        multi-branch block, and notes (blocks that look as if they had branches, but are unknown).
    """
    merged = copy.deepcopy(model).eval()
    bake_parametrizations(merged)
    merged, records = merge_branches(merged, inplace=True)
    folded = fold_conv_norm_pairs(merged, run, inplace=True)
    notes = []
    for name in find_unknown_multibranch(merged, run):
        kind = type(merged.get_submodule(name)).__name__
        notes.append(
            f"{name} ({kind}) looks like a multi-branch block that is not known; it stays as plain "
            f"convolutions. Teach it with repapq_plugin.register_branches."
        )
        logger.warning(notes[-1])
    return merged, QuantizationPlan(folded=tuple(folded)), tuple(records), tuple(notes)


@torch.no_grad()
def prepare_channels(
    model: nn.Module,
    run: Callable[[Any], Any],
    batches: Sequence[Any],
    names: Collection[str],
    config: RepAPQConfig,
) -> None:
    """Bring the channels of a merged float network into a form that suits integers, in place, as configured.

    Args:
        model: The network, in evaluation mode; it goes on computing what it did.
        run: Makes a forward pass of it on a batch.
        batches: Calibration batches.
        names: Module paths of the layers that will be quantized.
        config: Says what is done.
    """
    if config.fold_constants:
        fold_constant_channels(model, run, batches, names)
    if config.equalize:
        equalize_channels(model, run, batches, names)


def _quantize_merged(
    teacher: nn.Module,
    plan: QuantizationPlan,
    batches: Sequence[Any],
    config: RepAPQConfig,
    forward: ForwardFn,
    progress: Callable[[Progress], None] | None,
) -> CalibrationResult:
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    trace = trace_network(teacher, lambda: forward(teacher, batches[0]))
    layer_plans, reasons = plan_layers(teacher, trace, config)
    prepare_channels(teacher, lambda batch: forward(teacher, batch), batches, layer_plans, config)
    units = find_units(teacher, trace, layer_plans, config.units)
    stages = find_stages(teacher, trace, units, config.stages)
    student = copy.deepcopy(teacher)
    layers = insert_quantizers(student, layer_plans, config)
    counter = counted("ranges", len(batches), progress)
    set_starting_ranges(layers, lambda batch: forward(student, batch), batches, config, counter)
    unit_results: list[UnitResult] = []
    left_float: dict[str, str] = {}
    if config.steps:
        if config.affine:
            for layer in layers.values():
                attach_affine(layer)
        advance = counted("calibration", total_steps(stages, config), progress)
        learners = {name: LayerLearner(layer) for name, layer in layers.items()}
        networks = Networks(student, teacher, learners, trace, batches, forward)
        with ActivationCache(config.cache_bytes) as cache:
            calibrator = AcrossBlockCalibrator(networks, stages, config, cache, advance)
            unit_results = calibrator.run()
        left_float = calibrator.left_float
    _finish(student, teacher, layers, left_float)
    return CalibrationResult(
        model=student,
        config=config,
        plan=replace(
            plan,
            layers={name: value for name, value in layer_plans.items() if name not in left_float},
            float_layers={**reasons, **left_float},
        ),
        units=tuple(unit_results),
    )


def _finish(
    student: nn.Module, teacher: nn.Module, layers: Mapping[str, QuantizedLayer], left_float: Mapping[str, str]
) -> None:
    """Fold every affine layer, lay weights on their grid, and give failed layers their float weights back."""
    originals = {layers[name]: teacher.get_submodule(name) for name in left_float}
    for parent in list(student.modules()):
        for key, child in list(parent.named_children()):
            if child in originals:
                setattr(parent, key, originals[child])
    for layer in {id(layer): layer for name, layer in layers.items() if name not in left_float}.values():
        fold_affine(layer)
        for quantizer in (layer.weight_fake_quant, layer.input_fake_quant):
            quantizer.enable_observer(False)
            quantizer.activation_post_process.reset_min_max_vals()
