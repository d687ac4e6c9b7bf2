"""Schedules: what is optimised together. One unit after the other, a stage at once, or the whole network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor, nn

from repapq_plugin.core.tensors import floating_tensors
from repapq_plugin.method.cache import ActivationCache
from repapq_plugin.method.learners import Learner
from repapq_plugin.method.outputs import Outputs
from repapq_plugin.method.partition import Stage, Unit
from repapq_plugin.method.replay import answering, outputs_of, recording


class Role(Enum):
    """Whose activations are kept: the float network's or the quantized one's, read by a module or returned."""

    TEACHER_READS = "teacher reads"
    TEACHER = "teacher returns"
    STUDENT_READS = "student reads"
    STUDENT = "student returns"


class Activation(NamedTuple):
    """What the cache keeps activations under; the network as a whole is the module ``""``."""

    role: Role
    module: str


Cache = ActivationCache[Activation]


@dataclass(frozen=True)
class StageRun:
    """One stage of the quantized network, and what its units and it are compared with.

    Args:
        stage: The stage.
        modules: Modules of the quantized network, by module path.
        run_alone: Runs the quantized stage on what it is called with, call after call, as the network does.
        cache: Holds what the stage reads, and what its units and it return in the float network, per batch.
    """

    stage: Stage
    modules: Mapping[str, nn.Module]
    run_alone: Callable[[Sequence[Tensor]], list[Tensor]]
    cache: Cache

    def run(self, batch: int) -> list[Tensor]:
        """Run the quantized stage on its cached inputs, call after call."""
        return self.run_alone(self.cache.get(Activation(Role.STUDENT_READS, self.stage.name), batch))

    def student(self, units: Sequence[str], batch: int) -> Outputs:
        """Run the quantized stage; return what the named units and the stage gave."""
        with recording(self.modules, units) as outputs:
            stage = self.run(batch)
        return Outputs(outputs, [] if self.stage.name in units else stage)

    def teacher(self, units: Sequence[str], batch: int) -> Outputs:
        """Return what they gave in the float network."""
        outputs = {name: self.cache.get(Activation(Role.TEACHER, name), batch) for name in units}
        ends_with_unit = self.stage.name in units
        return Outputs(
            outputs, [] if ends_with_unit else self.cache.get(Activation(Role.TEACHER, self.stage.name), batch)
        )


class StageSubject:
    """A stage at once: all its units learn, in one forward and backward pass a step.

    Args:
        run: The stage.
        learners: What learns in it, by module path.
    """

    def __init__(self, run: StageRun, learners: Mapping[str, Learner]) -> None:
        self.name, self.learners, self._run = run.stage.name, learners, run
        self._units = [unit.name for unit in run.stage.units]

    def student(self, batch: int) -> Outputs:
        """Run the quantized stage on its cached inputs of ``batch``."""
        return self._run.student(self._units, batch)

    def teacher(self, batch: int) -> Outputs:
        """Return the float stage's outputs for ``batch`` from the cache."""
        return self._run.teacher(self._units, batch)


class UnitSubject:
    """One unit of a stage: those before it answer from the cache, those behind it are still float.

    Args:
        run: The stage; its cache holds what the finished units return, besides.
        learners: What learns in this unit.
        unit: The unit that learns.
        calls: Calls of it in one forward pass.
        finished: Names of the units of the stage that are done.
        stage_term: Whether the end of the stage supervises too; without it the pass ends at the unit.
    """

    def __init__(
        self,
        run: StageRun,
        learners: Mapping[str, Learner],
        unit: Unit,
        calls: int,
        finished: Sequence[str],
        stage_term: bool,
    ) -> None:
        self.name, self.learners, self._run = run.stage.name, learners, run
        self._unit, self._calls, self._finished, self._stage_term = unit.name, calls, tuple(finished), stage_term

    def student(self, batch: int) -> Outputs:
        """Run the stage with this unit live, as far as it is needed."""
        if not self._stage_term:
            return Outputs({self._unit: self.unit_outputs(batch)}, [])
        with self._replaying(batch):
            return self._run.student([self._unit], batch)

    def teacher(self, batch: int) -> Outputs:
        """Return the float outputs of the unit, and of the stage where it supervises."""
        outputs = self._run.teacher([self._unit], batch)
        return outputs if self._stage_term else Outputs(outputs.units, [])

    def unit_outputs(self, batch: int) -> list[Tensor]:
        """Return the outputs of this unit behind the quantized prefix, call after call."""
        with self._replaying(batch):
            return outputs_of(self._run.modules[self._unit], self._calls, lambda: self._run.run(batch))

    @contextmanager
    def _replaying(self, batch: int) -> Iterator[None]:
        stored = {name: self._run.cache.get(Activation(Role.STUDENT, name), batch) for name in self._finished}
        with answering(self._run.modules, stored):
            yield


class NetworkSubject:
    """The whole network as one stage: every unit's output and the network's own outputs supervise.

    Args:
        units: All units.
        learners: All that learns, by module path.
        student: The quantized network.
        teacher: The float network.
        forward: ``forward(model, batch_index)`` runs either on a calibration batch.
        cache: Keeps the float network's outputs, computed once per batch.
    """

    name = "network"

    def __init__(
        self,
        units: Sequence[Unit],
        learners: Mapping[str, Learner],
        student: nn.Module,
        teacher: nn.Module,
        forward: Callable[[nn.Module, int], object],
        cache: Cache,
    ) -> None:
        self.learners, self._cache, self._forward = learners, cache, forward
        self._units = [unit.name for unit in units]
        self._student, self._teacher = student, teacher
        self._student_modules, self._teacher_modules = dict(student.named_modules()), dict(teacher.named_modules())

    def student(self, batch: int) -> Outputs:
        """Run the quantized network on ``batch``."""
        return self._run(self._student, self._student_modules, batch)

    def teacher(self, batch: int) -> Outputs:
        """Return the float network's outputs for ``batch``, from the cache after the first time."""
        whole = Activation(Role.TEACHER, "")
        if (whole, batch) not in self._cache:
            with torch.no_grad():
                outputs = self._run(self._teacher, self._teacher_modules, batch)
            for name in self._units:
                self._cache.put(Activation(Role.TEACHER, name), batch, list(outputs.units[name]))
            self._cache.put(whole, batch, list(outputs.stage))
        units = {name: self._cache.get(Activation(Role.TEACHER, name), batch) for name in self._units}
        return Outputs(units, self._cache.get(whole, batch))

    def _run(self, model: nn.Module, modules: Mapping[str, nn.Module], batch: int) -> Outputs:
        with recording(modules, self._units) as units:
            outputs = floating_tensors(self._forward(model, batch))
        return Outputs(units, outputs)
