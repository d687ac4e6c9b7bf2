"""The optimisation of one subject (a unit, a stage, the network) against the float network, with its guard."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core import ranks
from repapq_plugin.core.part_files import Halfway, Record, Tensors
from repapq_plugin.core.progress import Advance
from repapq_plugin.method.learners import (
    Learner,
    leave_ties,
    load_state,
    output_magnitudes,
    parameter_groups,
    restore,
    snapshot,
    state_of,
)
from repapq_plugin.method.outputs import Outputs as Outputs
from repapq_plugin.method.outputs import Subject as Subject
from repapq_plugin.method.shares import Share

logger = logging.getLogger(__name__)


Loss = Callable[[Outputs, Outputs], tuple[Tensor, dict[str, Tensor]]]
"""``loss(outputs, targets)`` returns what is minimised and each unit's part of it, scalars."""


@dataclass(frozen=True)
class Outcome:
    """What an optimisation did, measured on held-out batches.

    Args:
        unit_losses_before: Relative loss of each unit at its starting point.
        unit_losses_after: The same with what was kept.
        kept: Whether the result was better than its starting point and therefore stays.
        seconds: Time spent.
        note: Why a result was not kept, or what else is worth saying.
    """

    unit_losses_before: dict[str, float]
    unit_losses_after: dict[str, float]
    kept: bool
    seconds: float
    note: str = ""

    @classmethod
    def of(cls, record: Mapping[str, object]) -> Outcome:
        """Return the outcome that ``dataclasses.asdict`` turned into ``record``."""
        return cls(**cast("dict[str, Any]", record))


def split_batches(count: int, guard_fraction: float, views: int = 1) -> tuple[list[int], list[int]]:
    """Return indices of training and of held-out batches; a held-out image is so in each of its views.

    A single batch, or no guard, leaves nothing to hold out: the result is judged on what it learned from.

    Args:
        count: Number of batches, all views together.
        guard_fraction: Share that is held out.
        views: How often the same batches come, see `repapq_plugin.method.views.Views`.
    """
    of_one = count // views
    held_out = max(1, round(of_one * guard_fraction)) if guard_fraction and of_one > 1 else 0
    training = [index for index in range(count) if index % of_one < of_one - held_out]
    return training, [index for index in range(count) if index % of_one >= of_one - held_out] or training


def reconstruct(
    subject: Subject,
    loss: Loss,
    batches: int,
    config: RepAPQConfig,
    advance: Advance,
    halfway: Halfway | None = None,
    views: int = 1,
    share: Share | None = None,
) -> Outcome:
    """Minimise the loss of ``subject`` and keep the result if held-out batches agree.

    Args:
        subject: What is optimised.
        loss: What is minimised.
        batches: Number of cached batches.
        config: Steps, learning rates, guard.
        advance: Called after each step.
        halfway: Keeps how far it is.
        views: How often the same batches come.
        share: Of which batches this rank has a part, if there are several ranks.
    """
    started = time.perf_counter()
    share = share or Share()
    training, held_out = split_batches(batches, config.guard_fraction, views)
    share.prepare(subject, sorted({*training, *held_out}))
    before, parts_before = evaluate(subject, loss, held_out, share)
    start = snapshot(subject.learners)
    note = _optimise(subject, loss, training, config, advance, halfway or Halfway(), share)
    leave_ties(subject.learners)
    after, parts_after = evaluate(subject, loss, held_out, share)
    kept = math.isfinite(after) and after < before
    if kept and note:
        note += ": what was learned before is kept"
    if not kept:
        restore(subject.learners, start)
        note = (note or f"held-out loss went from {before:.4g} to {after:.4g}") + ": the starting point stays"
        logger.info("%s: %s", subject.name, note)
        parts_after = parts_before
    return Outcome(parts_before, parts_after, kept, time.perf_counter() - started, note)


@dataclass
class Optimisation:
    """All that the next step depends on, besides the data.

    Args:
        learners: What learns.
        optimizer: Adam.
        schedule: Of its rates.
        generator: Draws the order of batches.
        order: Batches that are still to come in this round, last first.
        step: Steps that are done.
    """

    learners: Mapping[str, Learner]
    optimizer: torch.optim.Adam
    schedule: torch.optim.lr_scheduler.CosineAnnealingLR
    generator: torch.Generator
    order: list[int]
    step: int = 0

    def next_of(self, training: Sequence[int]) -> int:
        """Return the batch that comes next; each round has an order of its own."""
        if not self.order:
            self.order = [training[i] for i in torch.randperm(len(training), generator=self.generator).tolist()]
        return self.order.pop()

    def state(self) -> tuple[Record, Tensors]:
        """Return it as plain values and as tensors, no copies."""
        adam = self.optimizer.state_dict()
        rates = [group["lr"] for group in adam["param_groups"]]
        record: Record = {
            "step": self.step,
            "order": self.order,
            "rates": rates,
            "schedule": self.schedule.state_dict(),
        }
        moments = {f"adam {key} {index}": each for index, kept in adam["state"].items() for key, each in kept.items()}
        learned = {f"learned {key}": value for key, value in state_of(self.learners).items()}
        return record, {"generator": self.generator.get_state(), **moments, **learned}

    def load(self, record: Record, tensors: Tensors) -> None:
        """Bring back what `state` returned."""
        load_state(self.learners, {key.removeprefix("learned "): value for key, value in tensors.items()})
        adam = self.optimizer.state_dict()
        for group, rate in zip(adam["param_groups"], cast("list[float]", record["rates"]), strict=True):
            group["lr"] = rate
        for name, value in tensors.items():
            if name.startswith("adam "):
                _, key, index = name.split()
                adam["state"].setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict(adam)
        self.schedule.load_state_dict(cast("dict[str, Any]", record["schedule"]))
        self.generator.set_state(tensors["generator"])
        self.order, self.step = list(cast("list[int]", record["order"])), int(cast(int, record["step"]))


def _optimise(
    subject: Subject,
    loss_of: Loss,
    training: list[int],
    config: RepAPQConfig,
    advance: Advance,
    halfway: Halfway,
    share: Share,
) -> str:
    run = (lambda: subject.student(training[0])) if share.has(training[0]) else None
    magnitudes = output_magnitudes(subject.learners, run)
    groups = parameter_groups(subject.learners, magnitudes, config.learning_rates)
    learned = [parameter for group in groups for parameter in cast("list[nn.Parameter]", group["params"])]
    for parameter in learned:
        parameter.requires_grad_(True)
    # One kernel per group: a network has many small ones, and their Python loop costs a tenth of a step.
    optimizer = torch.optim.Adam(groups, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.steps)
    now = Optimisation(subject.learners, optimizer, schedule, torch.Generator().manual_seed(config.seed), [])
    try:
        halfway.bring_back(now.load)
        for _ in range(now.step):
            advance(subject.name)
        for learner in subject.learners.values():
            learner.set_dropping(True)
        for step in range(now.step, config.steps):
            batch = now.next_of(training)
            ranks.reseed(config.seed, step)
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                value = share.backward(batch, partial(_loss, subject, loss_of, batch, share), learned)
            if not math.isfinite(value):
                return f"the loss became {value} at step {step}"
            optimizer.step()
            schedule.step()
            now.step = step + 1
            halfway.keep(now.state)
            advance(subject.name, value)
    finally:
        for learner in subject.learners.values():
            learner.set_dropping(False)
        for parameter in learned:
            parameter.requires_grad_(False)
            parameter.grad = None
    return ""


def _loss(subject: Subject, loss: Loss, batch: int, share: Share) -> tuple[Tensor, dict[str, Tensor]]:
    target, output = share.targets(subject, batch), subject.student(batch)
    return loss(output, target)


@torch.no_grad()
def evaluate(
    subject: Subject, loss: Loss, batches: Sequence[int], share: Share | None = None
) -> tuple[float, dict[str, float]]:
    """Return the mean loss over ``batches`` and each unit's mean part of it, on all ranks the same.

    Args:
        subject: What is evaluated.
        loss: By what.
        batches: Numbers of batches.
        share: Of which of them this rank has a part; it is prepared.
    """
    mine = share or Share()
    total, parts = 0.0, dict[str, float]()
    for value, by_unit in ranks.collect(lambda: _evaluate(subject, loss, batches, mine)):
        total += value
        for name, part in by_unit.items():
            parts[name] = parts.get(name, 0.0) + part
    return total, parts


def _evaluate(subject: Subject, loss: Loss, batches: Sequence[int], share: Share) -> tuple[float, dict[str, float]]:
    total, parts = 0.0, dict[str, float]()
    for batch in filter(share.has, batches):
        value, by_unit = _loss(subject, loss, batch, share)
        total += float(value) / len(batches)
        for name, part in by_unit.items():
            parts[name] = parts.get(name, 0.0) + float(part) / len(batches)
    return total, parts
