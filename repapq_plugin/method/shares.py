"""A subject whose batches are spread over ranks: losses on a rank's share become those on all, gradients are summed.

A batch of all ranks together is what each of them has under one number; where shares are uneven, some ranks have none
under the last numbers. Each sample counts alike, wherever it lies, so that ranks compute what one process would that
had all of them. For that it is told once, before a subject learns, how large its samples are on all ranks. A step then
takes a single all-reduce. Source: our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from repapq_plugin.config import LossName
from repapq_plugin.core import ranks
from repapq_plugin.core.losses import Alike, sample_sizes
from repapq_plugin.method.outputs import AlikeOutputs, Outputs, Subject

Sizes = tuple[dict[str, list[Tensor]], list[Tensor]]
"""Sizes of the samples of units' outputs by call, and of those at the end of the stage; ``(samples,)`` each."""


class Share:
    """This rank's share of the batches of a subject; with one process that is all of them.

    Args:
        own: Numbers of the batches of which this rank has a part; ``None``: all.
        loss: What sizes are measured by.
    """

    def __init__(self, own: Collection[int] | None = None, loss: LossName = "mse") -> None:
        self._own, self._loss = own, loss
        self._alike: dict[int, AlikeOutputs] = {}

    def has(self, batch: int) -> bool:
        """Whether this rank has a part of a batch."""
        return self._own is None or batch in self._own

    def prepare(self, subject: Subject, batches: Sequence[int]) -> None:
        """Tell all ranks how large the float network's samples are on each; nothing with one process."""
        if ranks.world().size == 1:
            return
        shares = ranks.collect(
            lambda: {batch: self._sizes(subject.teacher(batch)) for batch in batches if self.has(batch)}
        )
        for batch in batches:
            self._alike[batch] = _alike([share[batch] for share in shares if batch in share])

    def targets(self, subject: Subject, batch: int) -> Outputs:
        """Return the float network's outputs for this rank's part of a batch, and what lets samples count alike."""
        found = subject.teacher(batch)
        return replace(found, alike=self._alike[batch]) if batch in self._alike else found

    def _sizes(self, targets: Outputs) -> Sizes:
        units = {name: [self._size(each) for each in calls] for name, calls in targets.units.items()}
        return units, [self._size(each) for each in targets.stage]

    def _size(self, target: Tensor) -> Tensor:
        return sample_sizes(target, self._loss).cpu() if target.numel() else torch.zeros(0)

    def backward(
        self, batch: int, loss: Callable[[], tuple[Tensor, object]], parameters: Sequence[nn.Parameter]
    ) -> float:
        """Compute the gradients of the loss on a batch, summed over the ranks in one all-reduce; return the loss.

        Args:
            batch: Its number.
            loss: Returns first this rank's part of the loss; is not called where it has none.
            parameters: What learns; gradients of all others are left as they are.

        Raises:
            RankError, ElsewhereError: See `ranks.collect`.
        """
        if ranks.world().size == 1:
            value, _ = loss()
            value.backward()  # type: ignore[no-untyped-call]
            return float(value.detach())
        part, error = 0.0, None
        try:
            if self.has(batch):
                value, _ = loss()
                value.backward()  # type: ignore[no-untyped-call]
                part = float(value.detach())
        except Exception as raised:  # others wait for this rank
            error = raised
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        told = [float(each.grad is not None) for each in parameters] + [part, float(error is not None)]
        like = gradients[0] if gradients else torch.zeros(1)
        *summed, said = ranks.sum_([*gradients, torch.tensor(told, dtype=like.dtype, device=like.device)])
        *present, total, failed = said.tolist()
        if failed:
            ranks.agreed(lambda: _raise(error))
        for each, gradient, seen in zip(parameters, summed, present, strict=True):
            each.grad = gradient if seen else None
        return float(total)


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def _alike(shares: Sequence[Sizes]) -> AlikeOutputs:
    names = dict.fromkeys(name for units, _ in shares for name in units)
    units = {name: _alike_calls([units[name] for units, _ in shares if name in units]) for name in names}
    return AlikeOutputs(units, _alike_calls([stage for _, stage in shares]))


def _alike_calls(shares: Sequence[Sequence[Tensor]]) -> list[Alike]:
    """Return what lets samples of each call count alike, from the calls of each rank."""
    calls = max(map(len, shares), default=0)
    return [Alike.of([share[call] for share in shares if call < len(share)]) for call in range(calls)]
