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
    from collections.abc import Sequence

LOGGER = logging.getLogger(__name__)

SAME = 0.2
"""How far two runs may lie apart, in the mean: flips of codes that random weights amplify come to some hundredths,
mixed samples to about 1."""


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


@torch.no_grad()
def run_second_batch(model: nn.Module, call: Call, outputs: Sequence[Tensor]) -> SecondBatch:
    """Run the model on one sample more than the example has.

    The first axis of the first input is the batch, and that of every input of as many entries.

    Args:
        model: The deployed model.
        call: The call that the example stands for.
        outputs: What it returned on the example.
    """
    inputs = call.tensors
    size = next((x.shape[0] for x in inputs if x.dim()), 0)
    if not size:
        return SecondBatch(call, (), "the example has no batch axis")
    larger = call.with_inputs([_one_more(x) if x.dim() and x.shape[0] == size else x for x in inputs])
    try:
        returned = tuple(x.detach() for x in tensors_of(larger.run(model)))
    except Exception as error:  # whatever the user's forward raises
        if is_out_of_memory(error):
            raise
        return SecondBatch(larger, (), f"the model runs on no other one ({type(error).__name__}: {brief(error)})")
    if [x.dim() for x in returned] != [x.dim() for x in outputs]:
        return SecondBatch(larger, (), "for another one the model returns another number of tensors")
    return SecondBatch(larger, returned)


def _one_more(x: Tensor) -> Tensor:
    """Return ``x`` with one sample more, which is none of the others and yet as likely as they are."""
    first = x[:1]
    return torch.cat([x, first.roll(1, dims=-1) if x.dim() > 1 else first])


def reason_against(results: Sequence[Tensor], second: SecondBatch, at_least: float = 0.0) -> str:
    """Return why what a graph returned for the second batch is not what the model returned; empty if it is."""
    for result, output in zip(results, second.outputs, strict=True):
        if result.shape != output.shape:
            return f"for another one the graph returns {tuple(result.shape)} and the model {tuple(output.shape)}"
        if distance(result, output) > max(SAME, at_least):
            return "for another one the graph computes something else than the model"
    return ""


def distance(result: Tensor, output: Tensor) -> float:
    """Return ``|result - output| / |output|`` in float64, of norms over all values; 0 for equal ones.

    Values that are not finite count as 0.
    """
    one, reference = (x.detach().cpu().double().nan_to_num(0.0, 0.0, 0.0) for x in (result, output))
    difference = float((one - reference).norm())
    return difference / max(float(reference.norm()), torch.finfo(torch.float32).tiny)
