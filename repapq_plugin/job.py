"""The one job: merge, plan, condition, place, find ranges, learn, fold. Every host's calibration is this one.

`quantize_model` is the way in for any network; hosts run the same `Job` on a backend of theirs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import nn

from repapq_plugin.backend import Backend, OwnBackend, Placing
from repapq_plugin.conditioning.constant_channels import fold_constant_channels
from repapq_plugin.conditioning.equalize import equalize_channels
from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core import ranks
from repapq_plugin.core.checkpoints import Checkpoints
from repapq_plugin.core.copies import own_batch, own_copy, smaller
from repapq_plugin.core.data import shared_data
from repapq_plugin.core.drift import Drift, find_drift, kept_buffers, reset_buffers
from repapq_plugin.core.fingerprints import same_on_ranks
from repapq_plugin.core.notes import listed
from repapq_plugin.core.progress import Progress as Progress
from repapq_plugin.core.progress import Report as Report
from repapq_plugin.core.progress import counted as counted
from repapq_plugin.core.ranked_checkpoints import checkpoints_in
from repapq_plugin.core.running import Batch, ForwardFn, call_model, runs, seeded
from repapq_plugin.errors import CalibrationError
from repapq_plugin.merging import Merged as Merged
from repapq_plugin.merging import merge_for_inference as merge_for_inference
from repapq_plugin.method.across_block import AcrossBlockCalibrator, total_steps
from repapq_plugin.method.agreement import disagreement
from repapq_plugin.method.cache import ActivationCache
from repapq_plugin.method.estimate import estimate_job
from repapq_plugin.method.learners import snapshot
from repapq_plugin.method.optimise import split_batches
from repapq_plugin.method.partition import Stage, find_stages, find_units
from repapq_plugin.method.schedules import Activation
from repapq_plugin.method.stage_activations import Networks
from repapq_plugin.method.starting_ranges import not_quantizing, set_starting_ranges
from repapq_plugin.method.unit_result import UnitResult
from repapq_plugin.method.views import Views, count_views
from repapq_plugin.method.whole import Whole, error_of_whole, keep_what_helps, outside
from repapq_plugin.quantizers.plan import LayerPlan, QuantizationPlan, plan_layers
from repapq_plugin.quantizers.trace import Trace, trace_network
from repapq_plugin.result import Calibrated, CalibrationResult

logger = logging.getLogger(__name__)

R = TypeVar("R")


@dataclass
class State:
    """What a job knows; each phase adds to it.

    Args:
        merged: The float network that supervises, and how it was merged.
        batches: Calibration batches; of several ranks those of this one.
        done: Phases that are finished.
        trace: What a forward pass showed (after ``plan``).
        plans: Bits of each layer that is to be quantized, by module path (after ``plan``).
        float_layers: Why layers stay float, by module path.
        stages: What is supervised together, in call order (after ``place``).
        units: What became of each unit (after ``learn``).
        notes: What is worth telling with the result.
        shown: Set with several ranks: see `examples`.
    """

    merged: Merged
    batches: Sequence[Batch]
    done: list[str] = field(default_factory=list)
    trace: Trace = field(default_factory=lambda: Trace({}, {}))
    plans: dict[str, LayerPlan] = field(default_factory=dict)
    float_layers: dict[str, str] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    units: list[UnitResult] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shown: Sequence[Batch] = ()

    @property
    def examples(self) -> Sequence[Batch]:
        """Batches by which is seen how the network is made: the same on all ranks."""
        return self.shown or self.batches

    @property
    def teacher(self) -> nn.Module:
        """The merged float network."""
        return self.merged.network


class Job(Generic[R]):
    """Quantizes and calibrates one network on one backend.

    Args:
        backend: Carries the quantizers, and says which phases it needs.
        config: Bits, ranges and calibration.
        forward: Runs a network on a batch.
        report: Told as the work goes on.
        checkpoints: Keeps what is finished.
    """

    def __init__(
        self,
        backend: Backend[R],
        config: RepAPQConfig,
        forward: ForwardFn = call_model,
        report: Report | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.backend, self.config, self.report = backend, config, report
        self.checkpoints = checkpoints or Checkpoints()
        self._forward = forward
        self.drift = Drift()

    def forward(self, model: nn.Module, batch: Batch) -> object:
        """Run a network on a copy of a batch, which it may change, and of buffers that it goes on changing."""
        with kept_buffers(model, self.drift.buffers):
            return self._forward(model, own_batch(batch))

    def run(self, model: nn.Module, data: Iterable[Batch]) -> R:
        """Do all phases of the backend, one after the other, on a copy of ``model``.

        With several ranks each calls this with the same model and its own data.

        Raises:
            RepAPQError: See `quantize_model`, and the backend's ``check``.
        """
        started = time.perf_counter()
        with ranks.together(), torch.inference_mode(False), seeded(self.config.seed):
            shares = shared_data(data)
            state = State(Merged(model), shares.batches, notes=list(shares.notes), shown=shares.shown)
            self.backend.check(model, state.batches or state.examples, self.config)
            describe = partial(self.backend.fingerprint, model, state.batches, self.config)
            with self.checkpoints.opened(same_on_ranks(describe)):
                for phase in self.backend.phases:
                    getattr(self, phase)(state)
                    state.done.append(phase)
            state.notes += self.checkpoints.notes
            return self.backend.deliver(self._calibrated(state, time.perf_counter() - started), state.examples)

    def merge(self, state: State) -> None:
        """Merge branches and fold norms, on a copy."""
        run = self._passing(state.examples[0])
        self.drift = find_drift(own_copy(state.teacher), run)
        state.merged = merge_for_inference(state.teacher, run)

    def plan(self, state: State) -> None:
        """Decide what is quantized, and with how many bits."""
        teacher = state.teacher
        with torch.no_grad():
            state.batches, state.shown = (
                self.backend.join(teacher, batches) if batches else batches for batches in (state.batches, state.shown)
            )
        state.trace = trace_network(teacher, lambda: self.forward(teacher, state.examples[0]))
        state.plans, state.float_layers = plan_layers(teacher, state.trace, self.config)
        state.notes += self.config.runs_on.remarks({bits for plan in state.plans.values() for bits in plan.bits})

    def condition(self, state: State) -> None:
        """Bring channels into a form that suits integers; the float network goes on computing what it did."""

        def run(batch: Batch) -> object:
            return self.forward(state.teacher, batch)

        with torch.no_grad():
            if self.config.fold_constants:
                fold_constant_channels(state.teacher, run, state.batches, state.plans, state.examples)
            if self.config.equalize:
                equalized = equalize_channels(state.teacher, run, state.batches, state.plans, state.examples)
                state.notes += equalized.notes
        ranks.level({**dict(state.teacher.named_parameters()), **dict(state.teacher.named_buffers())})

    def place(self, state: State) -> None:
        """Let the backend make the network that carries quantizers, and find units and stages in it."""
        teacher, config = state.teacher, self.config
        while True:
            self.backend.place(Placing(teacher, state.trace, state.plans, state.examples, self.forward, config))
            differing = ranks.first(partial(self._differing_when_off, state))
            if differing is None:
                break
            if differing not in state.plans or not self.backend.places_again:
                raise CalibrationError(
                    f"With its quantizers off, what {type(self.backend).__name__} made differs from the float network"
                    f"{f' at {differing!r}' if differing else ''}; keep that part float with keep_float."
                )
            del state.plans[differing]
            state.float_layers[differing] = "with its quantizers off it does not compute what it did"
        for parameter in teacher.parameters():
            parameter.requires_grad_(False)
        units = find_units(teacher, state.trace, self.backend.sites.weights, config.units)
        state.stages = find_stages(teacher, state.trace, units, config.stages)

    def _differing_when_off(self, state: State) -> str | None:
        """Return by which layer the placed network, its quantizers off, differs from the float one, if it does."""
        first, half = state.examples[0], smaller(state.examples[0])
        other = half if half is not None and runs(partial(self.forward, state.teacher, half)) else state.examples[-1]
        passes = [self._passing(batch) for batch in ([first] if other is first else [first, other])]
        sites = self.backend.sites
        with not_quantizing(sites.quantizers):
            return disagreement(state.teacher, self.backend.student, list(sites.weights), passes)

    def _passing(self, batch: Batch) -> Callable[[nn.Module], object]:
        return lambda model: self.forward(model, batch)

    def find_ranges(self, state: State, part: str = "ranges") -> None:
        """Give every quantizer its starting range; ``part`` is what the checkpoints call it."""
        if "learn" in self.backend.phases and (self.config.steps or self.config.solve):
            say_estimate(self, state)
        advance = counted("ranges", ranks.most(len(state.batches)), self.report)
        student, sites = self.backend.student, self.backend.sites
        run = partial(self.forward, student)
        self.checkpoints.once(
            part,
            lambda: set_starting_ranges(sites, run, state.batches, self.config, advance),
            sites.ranges,
            sites.load_ranges,
        )

    def learn(self, state: State) -> None:
        """Calibrate across blocks, with QPR's affine layers attached."""
        backend, config = self.backend, self.config
        if not config.steps and not config.solve:
            return
        if config.affine:
            backend.attach_affine()
        views = count_views(state.examples, config.views)
        networks = Networks(
            backend.student,
            state.teacher,
            backend.learners(),
            backend.sites.weights,
            state.trace,
            Views(state.batches, views, config.seed, ranks.most(len(state.batches))),
            self.forward,
            backend.run_alone,
            views,
        )
        advance = counted("calibration", total_steps(state.stages, config, self.checkpoints.finished), self.report)
        names = [name for stage in state.stages for name in (stage.name, *(unit.name for unit in stage.units))]
        with backend.learning(names), ActivationCache[Activation](config.cache_bytes) as cache:
            before = self._whole_error(state)
            start = snapshot(networks.learners)
            calibrator = AcrossBlockCalibrator(networks, state.stages, config, cache, advance, self.checkpoints)
            results = calibrator.run()
            learners = outside(networks.learners, calibrator.left_float)
            state.units, note = keep_what_helps(
                results, state.stages, learners, start, before, partial(self._whole_error, state)
            )
            state.notes += [note] if note else []
        state.float_layers |= calibrator.left_float
        if calibrator.left_float.keys() >= backend.plans.keys():
            reason = next(iter(calibrator.left_float.values()))
            raise CalibrationError(f"No part of the network can be calibrated: each {reason}.")
        if calibrator.left_float:
            state.notes.append(
                f"{len(calibrator.left_float)} layers could not be calibrated: {listed(calibrator.left_float)}"
            )

    def _whole_error(self, state: State) -> float:
        """Return the relative error of the quantized network's outputs on held-out batches."""
        _, held_out = split_batches(ranks.most(len(state.batches)), self.config.guard_fraction)
        whole = Whole(self.backend.student, state.teacher, state.batches, self.forward)
        return error_of_whole(whole, held_out, self.config.loss)

    def fold(self, state: State) -> None:
        """Fold the affine layers, and leave the network as it is delivered."""
        left = {name: reason for name, reason in state.float_layers.items() if name in self.backend.plans}
        self.backend.fold(state.teacher, left)

    def _calibrated(self, state: State, seconds: float) -> Calibrated:
        reset_buffers(self.backend.student, self.drift.buffers)
        plans = self.backend.plans
        reasons = {name: self.backend.unplaced for name in state.plans} | state.float_layers
        float_layers = {name: reason for name, reason in reasons.items() if name not in plans}
        return Calibrated(
            model=self.backend.student,
            config=self.config,
            plan=QuantizationPlan(
                state.merged.folded, plans, float_layers, state.merged.baked, self.backend.skips, self.backend.outputs
            ),
            units=tuple(state.units),
            merges=state.merged.records,
            seconds=seconds,
            notes=(*state.merged.notes, *self.drift.notes, *state.notes),
        )


def say_estimate(job: Job[R], state: State) -> None:
    """Say what the rest of a calibration will take; nothing that comes later depends on it."""
    networks, batches = (state.teacher, job.backend.student), state.batches or state.examples
    with seeded(job.config.seed):
        expected = estimate_job(
            networks,
            state.stages,
            job.config,
            batches,
            job.backend.sites.weights,
            partial(job.forward, state.teacher),
            total_steps(state.stages, job.config, job.checkpoints.finished),
        )
    logger.info("Estimate: %s.", expected)
    if job.report is not None:
        job.report(expected.progress)


def quantize_model(
    model: nn.Module,
    data: Iterable[Batch],
    config: RepAPQConfig | None = None,
    *,
    forward_fn: ForwardFn | None = None,
    progress: Report | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
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
        checkpoint_dir: Folder that keeps each part that is finished; empty or missing, unless ``resume``.
        resume: Go on with what it keeps, to the last bit as if nothing had interrupted; or begin, if there is nothing.

    Returns:
        The quantized network and the record of how it came about.

    Raises:
        CalibrationError: ``data`` is empty, activations are not finite, or nothing can be quantized.
        ConfigError: A pattern of ``config`` matches nothing.
        CheckpointError: ``checkpoint_dir`` cannot be used, or holds another calibration.
    """
    checkpoints = checkpoints_in(checkpoint_dir, resume)
    return Job(OwnBackend(), config or RepAPQConfig(), forward_fn or call_model, progress, checkpoints).run(model, data)
