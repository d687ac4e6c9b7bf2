"""A job stopped between two phases: networks with quantizers in them, for tests of what comes next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor, nn

from repapq_plugin.backend import Backend, OwnBackend
from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.running import call_model, seeded
from repapq_plugin.job import Job, Merged, State
from repapq_plugin.method.across_block import Networks
from repapq_plugin.result import CalibrationResult

R = TypeVar("R")


def after(
    phase: str, model: nn.Module, data: Sequence[Tensor], config: RepAPQConfig
) -> tuple[Job[CalibrationResult], State]:
    """Run all phases up to and with ``phase`` on the plugin's own backend."""
    return on_backend_after(OwnBackend(), phase, model, data, config)


def on_backend_after(
    backend: Backend[R], phase: str, model: nn.Module, data: Sequence[Tensor], config: RepAPQConfig
) -> tuple[Job[R], State]:
    """Run all of a backend's phases up to and with ``phase``."""
    job, state = Job(backend, config), State(Merged(model), list(data))
    with seeded(config.seed):
        backend.check(model, state.batches, config)
        for name in backend.phases[: list(backend.phases).index(phase) + 1]:
            getattr(job, name)(state)
            state.done.append(name)
    return job, state


def networks_of(job: Job[CalibrationResult], state: State) -> Networks:
    """Return what the method is given by a job."""
    backend = job.backend
    return Networks(
        backend.student,
        state.teacher,
        backend.learners(),
        backend.sites.weights,
        state.trace,
        state.batches,
        call_model,
        backend.run_alone,
    )
