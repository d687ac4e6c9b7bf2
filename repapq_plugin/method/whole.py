"""The last word on what was learned: it stays as far as the whole network is no worse for it than with ranges alone.

Each stage was judged by its own output. Errors of stages can add up in the network's output, so that is compared as
well, on the same held-out batches. Where it grew, stages are undone from the last one on until it is back: what is left
is a state that calibration passed through. Raw outputs are not a score, and few batches are held out; a network that
scored better all the same is given up for never delivering one that is worse (our choice).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from repapq_plugin.config import LossName
from repapq_plugin.core import ranks
from repapq_plugin.core.running import Batch, ForwardFn
from repapq_plugin.core.tensors import floating_tensors
from repapq_plugin.method.across_block import mean_relative_loss
from repapq_plugin.method.learners import Learner, restore
from repapq_plugin.method.outputs import Outputs
from repapq_plugin.method.partition import Stage, is_inside
from repapq_plugin.method.shares import Share
from repapq_plugin.method.unit_result import UnitResult

logger = logging.getLogger(__name__)


def keep_what_helps(
    results: Sequence[UnitResult],
    stages: Sequence[Stage],
    learners: Mapping[str, Learner],
    start: Mapping[str, Mapping[str, Tensor]],
    before: float,
    error: Callable[[], float],
) -> tuple[list[UnitResult], str]:
    """Undo what was learned, stage after stage from the last one on, until the whole network is not worse.

    Args:
        results: What calibration did to each unit.
        stages: All stages, in call order.
        learners: What learned, by module path; changed in place. Those of layers that stay float are left out.
        start: What `repapq_plugin.method.learners.snapshot` gave before anything was learned.
        before: The whole network's error on held-out batches at that time.
        error: Returns that error as the network is now.

    Returns:
        What is left of each unit's learning, and a note if some was undone, else an empty text.
    """
    kept = {result.name for result in results if result.kept}
    grown = left = error() if kept else before
    undone: set[str] = set()
    for stage in reversed(stages):
        if left <= before or undone >= kept:
            break
        units = {unit.name for unit in stage.units} & kept
        if units:
            undone |= units
            # What lies in no stage goes with the last that is undone.
            gone = learners if undone >= kept else _inside(learners, stage.name)
            restore(gone, start)
            left = error()
    if not undone:
        return list(results), ""
    rest = f"{left:.4g} now" if undone < kept else "ranges only"
    why = f"the whole network's held-out error went from {before:.4g} to {grown:.4g}"
    note = f"Learning was undone in {len(undone)} of {len(kept)} units, from the last stage on: {why}; {rest}."
    logger.info(note)
    return [_undone(result, f"undone: {why}") if result.name in undone else result for result in results], note


def _inside(learners: Mapping[str, Learner], name: str) -> dict[str, Learner]:
    return {path: learner for path, learner in learners.items() if is_inside(path, name)}


def _undone(result: UnitResult, note: str) -> UnitResult:
    return replace(result, loss_after=result.loss_before, kept=False, note=note)


def outside(learners: Mapping[str, Learner], names: Collection[str]) -> dict[str, Learner]:
    """Return the learners of other layers than those named."""
    return {path: learner for path, learner in learners.items() if path not in names}


@dataclass
class Whole:
    """The whole network, to be compared with the float one on calibration batches.

    Args:
        network: The quantized one.
        float_network: The float one.
        batches: Calibration batches; of several ranks those of this one.
        forward: Runs either.
    """

    network: nn.Module
    float_network: nn.Module
    batches: Sequence[Batch]
    forward: ForwardFn
    name: str = "network"
    learners: Mapping[str, Learner] = field(default_factory=dict)

    def student(self, batch: int) -> Outputs:
        """Return what the quantized network returns for a batch."""
        return Outputs({}, floating_tensors(self.forward(self.network, self.batches[batch])))

    def teacher(self, batch: int) -> Outputs:
        """Return what the float network returns for a batch."""
        return Outputs({}, floating_tensors(self.forward(self.float_network, self.batches[batch])))


@torch.no_grad()
def error_of_whole(whole: Whole, held_out: Sequence[int], loss: LossName) -> float:
    """Return the relative error of the network's outputs on held-out batches of all ranks.

    Args:
        whole: The network.
        held_out: Numbers of the batches.
        loss: What the error is measured by.
    """
    share = Share(range(len(whole.batches)), loss)
    share.prepare(whole, held_out)

    def total() -> float:
        total = 0.0
        for batch in filter(share.has, held_out):
            targets, outputs = share.targets(whole, batch), whole.student(batch)
            alike = None if targets.alike is None else targets.alike.stage
            total += float(mean_relative_loss(outputs.stage, targets.stage, loss, alike))
        return total

    return sum(ranks.collect(total)) / len(held_out)
