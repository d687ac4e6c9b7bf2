"""Whether a network with its quantizers off is still the float network, to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from repapq_plugin.core.hooks import Hooks, unseen
from repapq_plugin.core.running import frozen
from repapq_plugin.core.tensors import floating_tensors

Passes = Sequence[Callable[[nn.Module], object]]
"""Each makes one forward pass of the network that it is given."""


def disagreement(teacher: nn.Module, student: nn.Module, layers: Sequence[str], passes: Passes) -> str | None:
    """Return which layer makes a quantized network, its quantizers off, differ from the float one.

    Both are run with and without gradients.

    Args:
        teacher: The float network.
        student: The quantized network; its quantizers are off.
        layers: Module paths of the quantized layers, in call order.
        passes: Forward passes on batches, of different size where there are such.

    Returns:
        The module path of the first layer whose output differs; an empty text if none of them does and the outputs
        differ all the same; ``None`` if they are equal.
    """
    for run in passes:
        for gradients in (False, True):
            with _weights_requiring_gradients(gradients, teacher, student):
                wanted, seen = _watched(teacher, layers, run)
                got, mine = _watched(student, layers, run)
            if _equal(got, wanted):
                continue
            again, _ = _watched(teacher, layers, run)
            if not _equal(again, wanted):
                continue  # a network of chance
            return next((name for name in layers if not _equal(mine[name], seen[name])), "")
    return None


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(some, others, strict=True)
    )


def _watched(
    model: nn.Module, layers: Sequence[str], run: Callable[[nn.Module], object]
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def see(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: object, output: object) -> None:
            with unseen():
                seen[name] += [tensor.detach().clone() for tensor in floating_tensors(output)]

        return hook

    with Hooks() as hooks:
        for name in layers:
            hooks.after(model.get_submodule(name), see(name))
        outputs = floating_tensors(run(model))
    return [tensor.detach().clone() for tensor in outputs], seen


@contextmanager
def _weights_requiring_gradients(enabled: bool, *models: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(frozen(model))
        for parameter in (p for model in models for p in model.parameters() if p.is_floating_point()):
            parameter.requires_grad_(enabled)
        stack.enter_context(torch.set_grad_enabled(enabled))
        yield
