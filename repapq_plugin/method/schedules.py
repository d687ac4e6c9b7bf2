"""What can be optimised together: one unit of a stage, a stage at once, the whole network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from repapq_plugin.method.cache import ActivationCache
from repapq_plugin.method.learners import Learner
from repapq_plugin.method.optimise import Outputs
from repapq_plugin.method.partition import Stage, Unit
from repapq_plugin.method.replay import answering, outputs_of, recording
from repapq_plugin.quantizers.trace import flatten_tensors

RunAlone = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]
"""Runs one module of the quantized network on what it is called with, call after call, as the network does."""


class StageSubject:
    """A stage at once: all its units learn, in one forward and backward pass a step.

    Args:
        stage: The stage.
        learners: What learns in it, by module path.
        modules: Modules of the quantized network, by module path.
        run_alone: Runs the quantized stage on its inputs, call after call.
        cache: Holds ``student-in:<stage>``, ``teacher:<unit>`` and ``teacher:<stage>`` per batch.
    """

    def __init__(
        self,
        stage: Stage,
        learners: Mapping[str, Learner],
        modules: Mapping[str, nn.Module],
        run_alone: RunAlone,
        cache: ActivationCache,
    ) -> None:
        self.name = stage.name
        self.stage, self.learners, self.modules, self.cache = stage, learners, modules, cache
        self.run_alone = run_alone
        self.active: Sequence[str] = [unit.name for unit in stage.units]

    def run(self, batch: int) -> list[torch.Tensor]:
        """Run the quantized stage on its cached inputs, call after call."""
        return self.run_alone(self.cache.get(f"student-in:{self.name}", batch))

    def student(self, batch: int) -> Outputs:
        """Run the quantized stage on its cached inputs of ``batch``."""
        with recording(self.modules, self.active) as units:
            stage = self.run(batch)
        return Outputs(units, [] if self.name in self.active else stage)

    def teacher(self, batch: int) -> Outputs:
        """Return the float stage's outputs for ``batch`` from the cache."""
        units = {name: self.cache.get(f"teacher:{name}", batch) for name in self.active}
        return Outputs(units, [] if self.name in self.active else self.cache.get(f"teacher:{self.name}", batch))


class UnitSubject(StageSubject):
    """One unit of a stage: those before it answer from the cache, those behind it are still float.

    Args:
        unit: The unit that learns.
        calls: Calls of it in one forward pass.
        finished: Names of the units of the stage that are done.
        stage_term: Whether the end of the stage supervises too; without it the pass ends at the unit.
        stage: See `StageSubject`, as for the rest.
        learners: What learns in this unit.
        modules: Modules of the quantized network.
        run_alone: Runs the quantized stage.
        cache: Holds ``student:<unit>`` of finished units besides what a stage needs.
    """

    def __init__(
        self,
        unit: Unit,
        calls: int,
        finished: Sequence[str],
        stage_term: bool,
        stage: Stage,
        learners: Mapping[str, Learner],
        modules: Mapping[str, nn.Module],
        run_alone: RunAlone,
        cache: ActivationCache,
    ) -> None:
        super().__init__(stage, learners, modules, run_alone, cache)
        self.unit, self.calls, self.finished, self.stage_term = unit, calls, tuple(finished), stage_term
        self.active = [unit.name]

    def student(self, batch: int) -> Outputs:
        """Run the stage with this unit live, as far as it is needed."""
        if not self.stage_term:
            return Outputs({self.unit.name: self.unit_outputs(batch)}, [])
        with self._replaying(batch):
            return super().student(batch)

    def teacher(self, batch: int) -> Outputs:
        """Return the float outputs of the unit, and of the stage where it supervises."""
        outputs = super().teacher(batch)
        return outputs if self.stage_term else Outputs(outputs.units, [])

    def unit_outputs(self, batch: int) -> list[torch.Tensor]:
        """Return the outputs of this unit behind the quantized prefix, call after call."""
        with self._replaying(batch):
            return outputs_of(self.modules[self.unit.name], self.calls, lambda: self.run(batch))

    def _replaying(self, batch: int) -> Any:
        return answering(self.modules, {name: self.cache.get(f"student:{name}", batch) for name in self.finished})


class NetworkSubject:
    """The whole network as one stage: every unit's output and the network's own outputs supervise.

    Args:
        units: All units.
        learners: All that learns, by module path.
        student_model: The quantized network.
        teacher_model: The float network.
        forward: ``forward(model, batch_index)`` runs either on a calibration batch.
        cache: Keeps the float network's outputs, computed once per batch.
    """

    name = "network"

    def __init__(
        self,
        units: Sequence[Unit],
        learners: Mapping[str, Learner],
        student_model: nn.Module,
        teacher_model: nn.Module,
        forward: Callable[[nn.Module, int], Any],
        cache: ActivationCache,
    ) -> None:
        self.active = [unit.name for unit in units]
        self.learners, self.cache, self.forward = learners, cache, forward
        self.student_model, self.teacher_model = student_model, teacher_model
        self.student_modules = dict(student_model.named_modules())
        self.teacher_modules = dict(teacher_model.named_modules())

    def student(self, batch: int) -> Outputs:
        """Run the quantized network on ``batch``."""
        return self._run(self.student_model, self.student_modules, batch)

    def teacher(self, batch: int) -> Outputs:
        """Return the float network's outputs for ``batch``, from the cache after the first time."""
        if ("teacher:", batch) not in self.cache:
            with torch.no_grad():
                outputs = self._run(self.teacher_model, self.teacher_modules, batch)
            for name in self.active:
                self.cache.put(f"teacher:{name}", batch, list(outputs.units[name]))
            self.cache.put("teacher:", batch, list(outputs.stage))
        units = {name: self.cache.get(f"teacher:{name}", batch) for name in self.active}
        return Outputs(units, self.cache.get("teacher:", batch))

    def _run(self, model: nn.Module, modules: Mapping[str, nn.Module], batch: int) -> Outputs:
        with recording(modules, self.active) as units:
            outputs = flatten_tensors(self.forward(model, batch))
        return Outputs(units, outputs)
