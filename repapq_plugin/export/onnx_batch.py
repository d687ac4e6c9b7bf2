"""Whether a graph may leave its batch open: only what ran with a second batch size may."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from repapq_plugin.core.running import is_out_of_memory
from repapq_plugin.core.tensors import tensors_of
from repapq_plugin.export.blame import brief
from repapq_plugin.export.calls import Call

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LOGGER = logging.getLogger(__name__)

SAME = 0.01
"""How far two runs may lie apart, in the mean: codes that fall to the other side of a rounding boundary move single
values, mixed samples all of them."""


@dataclass(frozen=True)
class SecondBatch:
    """What the model returned for another batch size than the example's.

    Args:
        call: The call that was made.
        outputs: The tensors that it returned, in order.
        reason: Why there is no such batch; empty where there is one.
    """

    call: Call
    outputs: tuple[Tensor, ...]
    reason: str = ""


@dataclass(frozen=True)
class Part:
    """Samples of the second batch that make a batch of the example's size.

    Args:
        call: The call with these samples alone.
        rows: Where they lie in the first axis of each output of the second batch.
    """

    call: Call
    rows: tuple[slice, ...]


@torch.no_grad()
def run_second_batch(model: nn.Module, call: Call, outputs: Sequence[Tensor]) -> SecondBatch:
    """Run the model on one sample more than the example has.

    The first axis of the first input is the batch, and that of every input of as many entries.

    Args:
        model: The deployed model.
        call: The call that the example stands for.
        outputs: What it returned on the example.
    """
    if not _size(call):
        return SecondBatch(call, (), "the example has no batch axis")
    larger = _changed(call, _one_more)
    try:
        returned = tuple(x.detach() for x in tensors_of(larger.run(model)))
    except Exception as error:  # whatever the user's forward raises
        if is_out_of_memory(error):
            raise
        return SecondBatch(larger, (), f"the model runs on no other one ({type(error).__name__}: {brief(error)})")
    if [x.dim() for x in returned] != [x.dim() for x in outputs]:
        return SecondBatch(larger, (), "for another one the model returns another number of tensors")
    return SecondBatch(larger, returned)


def _size(call: Call) -> int:
    return next((x.shape[0] for x in call.tensors if x.dim()), 0)


def _changed(call: Call, change: Callable[[Tensor], Tensor]) -> Call:
    size = _size(call)
    return call.with_inputs([change(x) if x.dim() and x.shape[0] == size else x for x in call.tensors])


def _one_more(x: Tensor) -> Tensor:
    """Return ``x`` with one sample more, which is none of the others and yet as likely as they are."""
    first = x[:1]
    return torch.cat([x, first.roll(1, dims=-1) if x.dim() > 1 else first])


@torch.no_grad()
def parts_of(plain: nn.Module, call: Call) -> tuple[Part, ...]:
    """Return the first and the last samples of the second batch, if a model treats samples one by one.

    Args:
        plain: The model in float, without quantizers: where nothing is rounded to a grid, batches of different size
            give the same to float rounding.
        call: The call that the example stands for.

    Returns:
        Two parts that hold every sample; none where a sample gets something else among others than among fewer.
    """
    together = tensors_of(_changed(call, _one_more).run(plain))
    parts = []
    for part, end in ((call, False), (_changed(call, lambda x: _one_more(x)[1:]), True)):
        alone = tensors_of(part.run(plain))
        parts.append(Part(part, tuple(_rows(x, end) for x in alone)))
        if not _agree(together, parts[-1], alone):
            return ()
    return tuple(parts)


def _rows(x: Tensor, end: bool) -> slice:
    if not x.dim() or not len(x):
        return slice(None)
    return slice(-len(x), None) if end else slice(None, len(x))


def _agree(together: Sequence[Tensor], part: Part, alone: Sequence[Tensor]) -> bool:
    """Whether samples got together what they got alone."""
    if not len(together) == len(part.rows) == len(alone):
        return False
    found = [x[rows] if x.dim() else x for x, rows in zip(together, part.rows, strict=True)]
    return all(x.shape == y.shape and distance(x, y) <= SAME for x, y in zip(found, alone, strict=True))


def reason_against(
    run: Callable[[Call], Sequence[Tensor]],
    second: SecondBatch,
    parts: Callable[[], Sequence[Part]],
    at_least: float = 0.0,
) -> str:
    """Return why a graph may not run on other batches than the example's; empty if it may.

    It has to give the model's results, or else, sample for sample, its own: those of the second batch are compared
    with those of batches of the example's size. In a deep model with random weights, one code that a runtime and torch
    round differently changes much; one runtime rounds the same sums the same way.

    Args:
        run: Runs the graph.
        second: What the model does for another batch size.
        parts: Gives the `parts_of` the model, if they are needed.
        at_least: How far the graph and the model lie apart on the example already.
    """
    results = run(second.call)
    for result, output in zip(results, second.outputs, strict=True):
        if result.shape != output.shape:
            return f"for another one the graph returns {tuple(result.shape)} and the model {tuple(output.shape)}"
    near = max(SAME, at_least)
    if all(distance(result, output) <= near for result, output in zip(results, second.outputs, strict=True)):
        return ""
    known = parts()
    if known and all(_agree(results, part, run(part.call)) for part in known):
        return ""
    return "for another one the graph computes something else than the model"


def distance(result: Tensor, output: Tensor) -> float:
    """Return ``|result - output| / |output|`` in float64, of norms over all values; 0 for equal ones.

    Values that are not finite count as 0.
    """
    one, reference = (x.detach().cpu().double().nan_to_num(0.0, 0.0, 0.0) for x in (result, output))
    difference = float((one - reference).norm())
    return difference / max(float(reference.norm()), torch.finfo(torch.float32).tiny)
