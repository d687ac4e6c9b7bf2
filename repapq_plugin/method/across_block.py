"""Across-block calibration: the loss, and a whole network's stages in order, each behind its quantized prefix.

Source: arXiv:2402.16121 (abstract): the stage output supervises, because the gradient of MAE alone
knows signs and no magnitudes, and because it ties neighbours' quantization parameters together. That
every term is divided by the magnitude of its target, and that units are averaged, is our choice.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core import ranks
from repapq_plugin.core.checkpoints import Checkpoints
from repapq_plugin.core.losses import Alike, relative_loss
from repapq_plugin.core.progress import Advance
from repapq_plugin.core.running import is_out_of_memory
from repapq_plugin.errors import CalibrationError, RepAPQError
from repapq_plugin.method.learners import Learner, load_state, state_of
from repapq_plugin.method.optimise import Outcome, Outputs, Subject, reconstruct, split_batches
from repapq_plugin.method.partition import Stage, Unit, is_inside
from repapq_plugin.method.schedules import Activation, Cache, NetworkSubject, Role, StageRun, StageSubject, UnitSubject
from repapq_plugin.method.shares import Share
from repapq_plugin.method.solve_units import StageSolver, solvable
from repapq_plugin.method.stage_activations import Networks, StageActivations
from repapq_plugin.method.unit_result import UnitResult, joined

logger = logging.getLogger(__name__)


def mean_relative_loss(
    outputs: Sequence[Tensor], targets: Sequence[Tensor], loss: str, alike: Sequence[Alike] | None = None
) -> Tensor:
    """Return the mean over tensors of `relative_loss`, a scalar.

    Args:
        outputs: Tensors of any shapes: the calls of a unit, or the outputs of a network.
        targets: The float network's tensors, of the same shapes.
        loss: ``"mae"`` or ``"mse"``.
        alike: One for each tensor, set where other ranks have more samples: what all ranks return is to be summed.
    """
    terms = []
    none: list[Alike | None] = [None] * len(targets)
    for output, target, over_ranks in zip(outputs, targets, alike or none, strict=True):
        if target.numel():
            terms.append(relative_loss(output, target, loss, over_ranks))
        elif over_ranks is not None and over_ranks.samples:
            terms.append(torch.zeros((), device=target.device))
    return torch.stack(terms).mean() if terms else torch.zeros(())


def across_block_loss(
    outputs: Outputs, targets: Outputs, *, loss: str, stage_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss that is minimised, and each unit's own part of it, scalars.

    Args:
        outputs: What the units being calibrated gave, call after call, and what the end of the stage did.
        targets: What the float network gave there; no stage where it ends with its only unit.
        loss: ``"mae"`` or ``"mse"``.
        stage_weight: Weight of the stage term against the mean of the unit terms.
    """
    alike = targets.alike
    parts = {
        name: mean_relative_loss(given, targets.units[name], loss, None if alike is None else alike.units[name])
        for name, given in outputs.units.items()
    }
    total = torch.stack(list(parts.values())).mean()
    if stage_weight and outputs.stage:
        total = total + stage_weight * mean_relative_loss(
            outputs.stage, targets.stage, loss, None if alike is None else alike.stage
        )
    return total, {name: part.detach() for name, part in parts.items()}


class AcrossBlockCalibrator:
    """Calibrates ``networks.student`` in place.

    Args:
        networks: See `Networks`; the input quantizers have their starting ranges.
        stages: All stages in call order.
        config: Schedule, steps, losses.
        cache: Where activations are kept.
        advance: Called after each optimisation step.
        checkpoints: Keeps what was learned.
    """

    def __init__(
        self,
        networks: Networks,
        stages: Sequence[Stage],
        config: RepAPQConfig,
        cache: Cache,
        advance: Advance,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.checkpoints = checkpoints or Checkpoints()
        self.networks, self.stages, self.config, self.cache, self.advance = networks, stages, config, cache, advance
        self.student_modules = dict(networks.student.named_modules())
        self.teacher_modules = dict(networks.teacher.named_modules())
        self._activations = StageActivations(networks, cache)
        self.left_float: dict[str, str] = {}
        self._solvable = solvable(networks.weights) if config.solve else {}

    def run(self) -> list[UnitResult]:
        """Calibrate everything; return one result per unit, in call order."""
        if self.config.schedule == "network":
            solved = self._calibrate_stages() if self._solvable else []
            learned = self._calibrate_network(self.config.steps) if self.config.steps else []
            return joined(solved, learned)
        results = self._calibrate_stages()
        if self.config.network_steps:
            results = joined(results, self._calibrate_network(self.config.network_steps), "network: ")
        return results

    def _calibrate_stages(self) -> list[UnitResult]:
        results: list[UnitResult] = []
        finished: list[Stage] = []
        for stage in self.stages:
            try:
                results += self._calibrate_stage(stage, finished)
                finished.append(stage)
            except RepAPQError:
                raise
            except Exception as error:  # whatever the network's own code raises when replayed
                if is_out_of_memory(error):
                    raise
                results += self._leave_float(stage, error)
        return results

    def _calibrate_network(self, steps: int) -> list[UnitResult]:
        networks = self.networks
        units = [u for stage in self.stages for u in stage.units if not set(u.layers) & set(self.left_float)]
        if not units:
            return []
        subject = NetworkSubject(
            units,
            {path: learner for path, learner in networks.learners.items() if path not in self.left_float},
            networks.student,
            networks.teacher,
            lambda model, batch: networks.forward_fn(model, networks.batches[batch]),
            self.cache,
        )
        self.cache.drop_everything()
        try:
            outcome = self._reconstruct("network", subject, steps)
        except RepAPQError:
            raise
        except Exception as error:  # whatever the network's own code raises when it learns
            if is_out_of_memory(error):
                raise
            raise CalibrationError(
                f"The network cannot learn as a whole ({type(error).__name__}: {error}). Choose schedule='stage' and "
                "network_steps=0, where a part that cannot learn stays float."
            ) from error
        return self._results("network", units, outcome)

    def _calibrate_stage(self, stage: Stage, finished: Sequence[Stage]) -> list[UnitResult]:
        ranks.agreed(partial(self._activations.prepare, stage, finished))
        solved = self._solve(stage)
        results: list[UnitResult] = []
        if self.config.steps and self.config.schedule != "network":
            by_unit = stage.learned(self.config.schedule) is stage.units
            results = self._unit_by_unit(stage) if by_unit else self._at_once(stage)
        ranks.agreed(partial(self._activations.finish, stage))
        return joined(solved, results)

    def _solve(self, stage: Stage) -> list[UnitResult]:
        """Solve the weights of a stage, where that is wanted."""
        if not self._solvable:
            return []
        networks = self.networks
        batches = split_batches(len(networks.batches), self.config.guard_fraction, networks.views)
        learners = self._learners_in(stage.name)
        solver = StageSolver(
            self._run_of(stage), self.teacher_modules, networks.calls, learners, batches, self._share()
        )
        record = self.checkpoints.once(
            f"{stage.part}, solved",
            lambda: {"units": [asdict(unit) for unit in solver.solve(self._solvable, self._loss)]},
            partial(state_of, learners),
            partial(load_state, learners),
        )
        return [UnitResult(**unit) for unit in cast("list[dict[str, Any]]", record["units"])]

    def _share(self) -> Share:
        return Share(self.networks.own, self.config.loss)

    def _run_of(self, stage: Stage) -> StageRun:
        return StageRun(stage, self.student_modules, partial(self.networks.run_alone, stage.name), self.cache)

    def _at_once(self, stage: Stage) -> list[UnitResult]:
        subject = StageSubject(self._run_of(stage), self._learners_in(stage.name))
        return self._results(stage.name, stage.units, self._reconstruct(stage.part, subject, self.config.steps))

    def _unit_by_unit(self, stage: Stage) -> list[UnitResult]:
        results: list[UnitResult] = []
        self._set_quantizing(stage.name, False)
        for position, unit in enumerate(stage.units):
            self._set_quantizing(unit.name, True)
            subject = UnitSubject(
                self._run_of(stage),
                self._learners_in(unit.name),
                unit,
                self.networks.calls(unit.name),
                [done.name for done in stage.units[:position]],
                bool(self.config.stage_weight),
            )
            results += self._results(stage.name, [unit], self._reconstruct(unit.part, subject, self.config.steps))
            ranks.agreed(partial(self._keep_outputs, unit, subject))
        self._set_quantizing(stage.name, True)
        return results

    @torch.no_grad()
    def _keep_outputs(self, unit: Unit, subject: UnitSubject) -> None:
        for index in self.networks.own:
            self.cache.put(Activation(Role.STUDENT, unit.name), index, subject.unit_outputs(index))

    def _reconstruct(self, part: str, subject: Subject, steps: int) -> Outcome:
        config, number = self.config.replace(steps=steps), len(self.networks.batches)
        halfway, views = self.checkpoints.halfway(part), self.networks.views
        learned = self.checkpoints.once(
            part,
            lambda: asdict(
                reconstruct(subject, self._loss, number, config, self.advance, halfway, views, self._share())
            ),
            partial(state_of, subject.learners),
            partial(load_state, subject.learners),
        )
        return Outcome.of(learned)

    def _loss(self, outputs: Outputs, targets: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        return across_block_loss(outputs, targets, loss=config.loss, stage_weight=config.stage_weight)

    def _learners_in(self, name: str) -> dict[str, Learner]:
        return {path: learner for path, learner in self.networks.learners.items() if is_inside(path, name)}

    def _set_quantizing(self, name: str, enabled: bool) -> None:
        for learner in self._learners_in(name).values():
            learner.set_quantizing(enabled)

    def _leave_float(self, stage: Stage, error: Exception) -> list[UnitResult]:
        reason = f"could not be run alone ({type(error).__name__}: {error})"
        logger.warning("Stage %r %s; its %d units stay float.", stage.name, reason, len(stage.units))
        for unit in stage.units:
            for name in unit.layers:
                self.left_float[name] = reason
        self._set_quantizing(stage.name, False)
        for role in Role:
            self.cache.drop_all(Activation(role, stage.name))
        nothing = dict.fromkeys((unit.name for unit in stage.units), float("nan"))
        return self._results(stage.name, stage.units, Outcome(nothing, nothing, False, 0.0, reason))

    def _results(self, stage: str, units: Sequence[Unit], outcome: Outcome) -> list[UnitResult]:
        return [
            UnitResult(
                name=unit.name,
                stage=stage,
                loss_before=outcome.unit_losses_before[unit.name],
                loss_after=outcome.unit_losses_after[unit.name],
                kept=outcome.kept,
                seconds=outcome.seconds / len(units),
                note=outcome.note,
            )
            for unit in units
        ]


def total_steps(stages: Sequence[Stage], config: RepAPQConfig, finished: Collection[str] = ()) -> int:
    """Return how many optimisation steps a calibration takes, for a progress bar; without the parts ``finished``."""
    if config.schedule == "network":
        steps = {"network": config.steps}
    else:
        learned = [part for stage in stages for part in stage.learned(config.schedule)]
        steps = {**{part.part: config.steps for part in learned}, "network": config.network_steps}
    return sum(count for part, count in steps.items() if part not in finished)
