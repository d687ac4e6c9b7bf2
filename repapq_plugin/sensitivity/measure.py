"""Measuring what each unit costs at each bit width: the unit alone is quantized, and the network's output compared.

The one job does what comes before: merge, plan, condition, place. Ranges are found once for each width, for all units
together; then units are switched on one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from repapq_plugin.backend import Placing, PlainBackend
from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.checkpoints import Checkpoints
from repapq_plugin.core.losses import relative_loss
from repapq_plugin.core.part_files import Record
from repapq_plugin.core.progress import Report, counted
from repapq_plugin.core.ranked_checkpoints import checkpoints_in
from repapq_plugin.core.ranks import world
from repapq_plugin.core.running import Batch, ForwardFn, call_model
from repapq_plugin.core.tensors import floating_tensors
from repapq_plugin.errors import CalibrationError, ConfigError
from repapq_plugin.job import Job, State
from repapq_plugin.method.partition import Unit
from repapq_plugin.method.starting_ranges import not_quantizing
from repapq_plugin.policy import bits_of
from repapq_plugin.quantizers.plan import LayerPlan, with_equal_bits_of_equal_weights
from repapq_plugin.result import Calibrated
from repapq_plugin.sensitivity.subjects import Subject, bytes_of, deciding_together, products_of
from repapq_plugin.sensitivity.table import Option, Sensitivity, UnitSensitivity
from repapq_plugin.sensitivity.widths import WIDTHS, Bits, bit_widths, shown

MEASURED_BATCHES = 4
"""Batches that outputs are compared on (our choice)."""

MOST_EVALUATIONS = 10
"""Evaluations of the task's metric, which takes much longer than all else."""

Score = Callable[[nn.Module], Mapping[str, float]]
"""Returns the task's metrics of a network like the one that was given."""


class SensitivityBackend(PlainBackend[Sensitivity]):
    """Carries the plugin's quantizers while units are measured.

    Args:
        told: What else the figures depend on, by name.
    """

    phases = ("merge", "plan", "condition", "place", "measure")
    measured: Sensitivity

    def __init__(self, told: Mapping[str, str]) -> None:
        self._told = dict(told)

    def told(self) -> dict[str, str]:
        """See `Backend`."""
        return self._told

    def quantizers_of(self, unit: Unit) -> list[nn.Module]:
        """Return the fake quantizers of a unit's weights and inputs, of what is added to its outputs, and of those."""
        layers = [self.layers[name] for name in unit.layers]
        added = [self._added[giver] for giver, skip in self._skips.items() if skip.layer in unit.layers]
        rounded = [self._rounded[giver] for giver, plan in self._outputs.items() if set(plan.layers) & set(unit.layers)]
        return [
            *added,
            *rounded,
            *(each for layer in layers for each in (layer.weight_fake_quant, layer.input_fake_quant)),
        ]

    def deliver(self, calibrated: Calibrated, batches: Sequence[Batch]) -> Sensitivity:
        """Return what was measured."""
        return self.measured


class SensitivityJob(Job[Sensitivity]):
    """Measures every unit of one network.

    Args:
        config: Grids and ranges; what it pins (``layer_bits``, ``first_last_bits``) is measured at those bits alone.
        widths: What all other units can get, those of the fewest bits first.
        batches: How many batches outputs are compared on.
        evaluations: How often the task's metric is evaluated: of the float network, then of the most damaging units
            at the fewest bits.
        score: Evaluates it.
        forward: Runs a network on a batch.
        report: Told as the work goes on.
        checkpoints: Keeps what is finished.
    """

    backend: SensitivityBackend

    def __init__(
        self,
        config: RepAPQConfig,
        widths: Sequence[Bits],
        batches: int = MEASURED_BATCHES,
        evaluations: int = 0,
        score: Score | None = None,
        forward: ForwardFn = call_model,
        report: Report | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        told = {
            "the bit widths": ", ".join(map(shown, widths)),
            "the number of compared batches": str(batches),
            "the number of evaluations": str(evaluations),
        }
        super().__init__(SensitivityBackend(told), config, forward, report, checkpoints)
        self.widths, self.evaluations, self.score = widths, evaluations, score
        self.compared = batches

    def measure(self, state: State) -> None:
        """Find ranges at each width, and quantize one unit after the other."""
        batches = state.batches[: self.compared]
        with torch.no_grad():
            wanted = [floating_tensors(self.forward(state.teacher, batch)) for batch in batches]
        if not any(tensor.numel() for tensors in wanted for tensor in tensors):
            raise CalibrationError("The network returns no floating-point tensor to compare; check forward_fn.")
        units = deciding_together([unit for stage in state.stages for unit in stage.units], state.teacher)
        plans = {bits: self._plans(state, units, bits) for bits in self.widths}
        products = products_of(state.teacher, state.plans, partial(self.forward, state.teacher, state.batches[0]))
        subjects = [Subject(unit, state.teacher, products, plans) for unit in units]
        if all(subject.pinned for subject in subjects):
            raise ConfigError("layer_bits and first_last_bits pin the bits of all units; leave some to choose.")
        scores = self._scored("float", state.teacher) if self.evaluations else {}
        found: dict[str, list[Option]] = {unit.name: [] for unit in units}
        advance = counted("sensitivity", sum(len(subject.plans) for subject in subjects), self.report)
        for bits in self.widths:
            state.plans = plans[bits]
            placing = Placing(state.teacher, state.trace, state.plans, state.batches, self.forward, self.config)
            self.backend.place(placing)
            self.find_ranges(state, f"ranges {shown(bits)}")
            for subject in subjects:
                if bits in subject.plans:
                    name = subject.unit.name
                    advance(f"{name}, {shown(bits)}")
                    found[name].append(subject.option(bits, *self._damage(subject.unit, bits, batches, wanted)))
            if bits == self.widths[0]:
                self._evaluate([subject.unit for subject in subjects if not subject.pinned], found)
        weights = [weight for subject in subjects for weight in subject.weights.values()]
        self.backend.measured = Sensitivity(
            tuple(UnitSensitivity(s.unit.name, s.size, tuple(found[s.unit.name])) for s in subjects),
            bytes_of([*state.teacher.parameters(), *state.teacher.buffers()], weights),
            self.config.scheme,
            scores,
            (*state.merged.notes, *state.notes),
        )

    def _plans(self, state: State, units: Sequence[Unit], bits: Bits) -> dict[str, LayerPlan]:
        """Return how layers are quantized if a width is given to all; each unit has quantizers of its own."""
        config = self.config.replace(weight_bits=bits[0], activation_bits=bits[1])
        owner = {name: unit.name for unit in units for name in unit.layers}
        groups: dict[object, int] = {}
        plans: dict[str, LayerPlan] = {}
        for name in state.plans:
            seen = state.trace.layers[name]
            weight_bits, activation_bits = bits_of(name, seen.at_an_end, config)
            group = groups.setdefault((owner[name], seen.input_key, activation_bits), len(groups))
            plans[name] = LayerPlan(weight_bits, activation_bits, group)
        return with_equal_bits_of_equal_weights(plans, dict(state.teacher.named_modules()))

    @contextmanager
    def _alone(self, unit: Unit) -> Iterator[None]:
        """Let one unit be quantized, for the time of a ``with`` block."""
        own = set(self.backend.quantizers_of(unit))
        with not_quantizing([each for each in self.backend.sites.quantizers if each.module not in own]):
            yield

    def _damage(
        self, unit: Unit, bits: Bits, batches: Sequence[Batch], wanted: Sequence[Sequence[Tensor]]
    ) -> tuple[float, float]:
        """Return noise and MAE at the network's output; see `Option`."""

        @torch.no_grad()
        def work() -> Record:
            noise = mae = 0.0
            with self._alone(unit):
                for batch, targets in zip(batches, wanted, strict=True):
                    outputs = floating_tensors(self.forward(self.backend.student, batch))
                    noise += float(relative_error(outputs, targets, "mse")) / len(batches)
                    mae += float(relative_error(outputs, targets, "mae")) / len(batches)
            if not math.isfinite(noise + mae):
                raise CalibrationError(f"With {unit.name!r} at {shown(bits)} the network's output is not finite.")
            return {"noise": noise, "mae": mae}

        done = self.checkpoints.once(f"{shown(bits)} {unit.name}", work, dict, _nothing)
        return _number(done["noise"]), _number(done["mae"])

    def _evaluate(self, units: Sequence[Unit], found: Mapping[str, list[Option]]) -> None:
        """Add the task's metrics of the most damaging units, as they are quantized now."""
        worst = sorted(units, key=lambda unit: -found[unit.name][-1].noise)
        for unit in worst[: max(0, self.evaluations - 1)]:
            with self._alone(unit):
                option = found[unit.name][-1]
                scores = self._scored(f"{shown(option.bits)} {unit.name}", self.backend.student)
                found[unit.name][-1] = replace(option, scores=scores)

    def _scored(self, name: str, model: nn.Module) -> dict[str, float]:
        score = self.score
        if score is None:
            raise ConfigError(f"evaluations={self.evaluations} needs score, which evaluates the task's metric.")
        done = self.checkpoints.once(
            f"score {name}", lambda: {key: _number(value) for key, value in score(model).items()}, dict, _nothing
        )
        return {key: _number(value) for key, value in done.items()}


def relative_error(outputs: Sequence[Tensor], targets: Sequence[Tensor], loss: str) -> Tensor:
    """Return the mean of `relative_loss` over tensors, each weighing as much as it has values: a scalar.

    With one weight for each tensor, the few cells of a detector's coarsest level would decide as much as the hundreds
    of its finest (our choice: for YOLOv6-n with ranges only, at a mean of 5 bits, it made a validation mAP of 0.76 out
    of 0.66).

    Args:
        outputs: A network's outputs, of any shapes.
        targets: The float network's, of the same shapes; without any value there is no error.
        loss: ``"mae"`` or ``"mse"``.
    """
    pairs = [(output, target) for output, target in zip(outputs, targets, strict=True) if target.numel()]
    terms = [relative_loss(output, target, loss) * target.numel() for output, target in pairs]
    return torch.stack(terms).sum() / sum(target.numel() for _, target in pairs) if terms else torch.zeros(())


def _nothing(_: Mapping[str, Tensor]) -> None:
    """Bring back no tensor: a record is all there is."""


def _number(value: object) -> float:
    try:
        return float(cast(float, value))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"score returned {value!r}, which is no number; return numbers by their names.") from error


def measure_sensitivity(
    model: nn.Module,
    data: Iterable[Batch],
    config: RepAPQConfig | None = None,
    *,
    bits: Sequence[str | int | Bits] = WIDTHS,
    batches: int = MEASURED_BATCHES,
    evaluations: int = 0,
    score: Score | None = None,
    forward_fn: ForwardFn | None = None,
    progress: Report | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
) -> Sensitivity:
    """Measure what each unit of ``model`` costs at each bit width: the unit quantized, and all else float.

    Args:
        model: As for `quantize_model`; it is not changed.
        data: Calibration batches. Ranges are found on all of them.
        config: Grids and ranges. What ``layer_bits`` and ``first_last_bits`` pin stays so.
        bits: Widths that each other unit can get; see `bit_widths`.
        batches: How many batches the outputs are compared on.
        evaluations: How often ``score`` may be called, up to `MOST_EVALUATIONS`: for the float network, then for the
            most damaging units at the fewest bits.
        score: Returns the task's metrics, finite or not, by name.
        forward_fn: See `quantize_model`.
        progress: See `quantize_model`.
        checkpoint_dir: Folder that keeps each measurement; see `quantize_model`.
        resume: Go on with what it keeps.

    Raises:
        CalibrationError: See `quantize_model`; or an output is not finite, or there is none.
        ConfigError: A value is not allowed, or the configuration pins all units.
        CheckpointError: See `quantize_model`.
    """
    config = config or RepAPQConfig()
    job = sensitivity_job(
        config, bits, batches, evaluations, score, forward_fn, progress, checkpoints_in(checkpoint_dir, resume)
    )
    return job.run(model, data)


def sensitivity_job(
    config: RepAPQConfig,
    bits: Sequence[str | int | Bits],
    batches: int,
    evaluations: int,
    score: Score | None,
    forward_fn: ForwardFn | None,
    progress: Report | None,
    checkpoints: Checkpoints,
) -> SensitivityJob:
    """Return a job that measures, its arguments checked; see `measure_sensitivity`."""
    if world().size > 1:
        raise ConfigError("Sensitivity is measured in one process; start one, or call it inside core.ranks.alone().")
    for key, value, lowest, highest in (
        ("batches", batches, 1, None),
        ("evaluations", evaluations, 0, MOST_EVALUATIONS),
    ):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < lowest or (highest is not None and value > highest):
            limits = f"from {lowest} to {highest}" if highest is not None else f"of at least {lowest}"
            raise ConfigError(f"{key}={value!r} is not allowed; choose a whole number {limits}.")
    if evaluations and score is None:
        raise ConfigError(f"evaluations={evaluations} needs score, which evaluates the task's metric.")
    widths = bit_widths(bits, config)
    return SensitivityJob(config, widths, batches, evaluations, score, forward_fn or call_model, progress, checkpoints)
