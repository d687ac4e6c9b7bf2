"""What stages read and return, in both networks: fetched behind quantized stages that are finished, and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from repapq_plugin.core.running import Batch, ForwardFn
from repapq_plugin.method.learners import Learner
from repapq_plugin.method.partition import Stage
from repapq_plugin.method.replay import answering, inputs_of, recording
from repapq_plugin.method.schedules import Activation, Cache, Role
from repapq_plugin.method.sites import WeightSite
from repapq_plugin.method.views import Views
from repapq_plugin.quantizers.trace import Trace


@dataclass(frozen=True)
class Networks:
    """The two networks and how to run them.

    Args:
        student: The quantized network.
        teacher: The float network, merged alike, with the same module paths.
        learners: What learns in the student, by the module path where it does.
        weights: The student's quantized weights, by the module path of their layer.
        trace: What a forward pass showed.
        batches: Calibration batches.
        forward_fn: ``forward_fn(model, batch)`` runs either.
        run_alone: ``run_alone(name, inputs)`` runs the student's module ``name`` on what it is
            called with, call after call, as the student does.
        views: How often the same batches come, see `repapq_plugin.method.views.Views`.
    """

    student: nn.Module
    teacher: nn.Module
    learners: Mapping[str, Learner]
    weights: Mapping[str, WeightSite]
    trace: Trace
    batches: Sequence[Batch]
    forward_fn: ForwardFn
    run_alone: Callable[[str, Sequence[Tensor]], list[Tensor]]
    views: int = 1

    @property
    def own(self) -> Sequence[int]:
        """Numbers of the batches of which this process has a part: all, unless there are several ranks."""
        return self.batches.own if isinstance(self.batches, Views) else range(len(self.batches))

    def calls(self, name: str) -> int:
        """How often one forward pass calls the module ``name``."""
        return self.trace.modules[name].calls


class StageActivations:
    """Caches the activations that the calibration of a stage needs.

    Args:
        networks: The quantized network and the float one.
        cache: Where activations are kept.
    """

    def __init__(self, networks: Networks, cache: Cache) -> None:
        self.networks, self.cache = networks, cache
        self._student = dict(networks.student.named_modules())
        self._teacher = dict(networks.teacher.named_modules())

    def prepare(self, stage: Stage, finished: Sequence[Stage]) -> None:
        """Cache what a stage reads in both networks, and what it and its units return in the float one.

        Args:
            stage: What is calibrated next.
            finished: Stages in front of it, which answer from the cache.
        """
        networks = self.networks
        self._fetch_inputs(networks.teacher, self._teacher, stage, finished, Role.TEACHER_READS, Role.TEACHER)
        self._run_teacher(stage)
        self._fetch_inputs(networks.student, self._student, stage, finished, Role.STUDENT_READS, Role.STUDENT)

    @torch.no_grad()
    def _fetch_inputs(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        stage: Stage,
        finished: Sequence[Stage],
        reads: Role,
        returns: Role,
    ) -> None:
        """Cache what the stage is called with, behind finished stages that answer from the cache."""
        module, calls = modules[stage.name], self.networks.calls(stage.name)
        for index in self.networks.own:
            batch = self.networks.batches[index]
            stored = {done.name: self.cache.get(Activation(returns, done.name), index) for done in finished}
            with answering(modules, stored):
                inputs = inputs_of(module, calls, partial(self.networks.forward_fn, model, batch))
            self.cache.put(Activation(reads, stage.name), index, inputs)

    @torch.no_grad()
    def _run_teacher(self, stage: Stage) -> None:
        """Cache the float outputs of the stage and of each of its units: one pass of the float stage."""
        modules, reads = self._teacher, Activation(Role.TEACHER_READS, stage.name)
        for index in self.networks.own:
            with recording(modules, [unit.name for unit in stage.units]) as units:
                outputs = [modules[stage.name](x) for x in self.cache.get(reads, index)]
            self.cache.put(Activation(Role.TEACHER, stage.name), index, outputs)
            for name, unit_outputs in units.items():
                if name != stage.name:
                    self.cache.put(Activation(Role.TEACHER, name), index, unit_outputs)

    @torch.no_grad()
    def finish(self, stage: Stage) -> None:
        """Cache the quantized stage's outputs for those behind it; forget what only its own units needed."""
        reads = Activation(Role.STUDENT_READS, stage.name)
        self.cache.drop_all(Activation(Role.TEACHER_READS, stage.name))
        for index in self.networks.own:
            outputs = self.networks.run_alone(stage.name, self.cache.get(reads, index))
            self.cache.put(Activation(Role.STUDENT, stage.name), index, outputs)
        self.cache.drop_all(reads)
        for unit in stage.units:
            if unit.name != stage.name:
                self.cache.drop_all(Activation(Role.STUDENT, unit.name))
                self.cache.drop_all(Activation(Role.TEACHER, unit.name))
