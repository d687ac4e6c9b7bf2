"""Replay: run a network's own ``forward`` while finished modules answer from the cache.

The glue between modules (a feature pyramid's additions, a detector's loops) is Python code that only
its owner knows. Replaying it costs nothing but the glue, so fetching the next unit's input, or running
the rest of a stage, stays linear in the number of units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from repapq_plugin.core.hooks import Hooks, other_forwards, unseen
from repapq_plugin.core.tensors import first_tensor


class _Reached(BaseException):
    """Ends a forward pass once all is known; not an ``Exception``, which a network might catch."""


@contextmanager
def answering(modules: Mapping[str, nn.Module], outputs: Mapping[str, Sequence[Tensor]]) -> Iterator[None]:
    """Let modules return stored outputs, call after call, instead of running.

    Args:
        modules: Modules by name.
        outputs: For each name that answers, one output per call.
    """

    def answering_with(stored: Sequence[Tensor]) -> Callable[..., Tensor]:
        remaining = iter(stored)
        return lambda *_, **__: next(remaining)

    with other_forwards({modules[name]: answering_with(stored) for name, stored in outputs.items()}):
        yield


@contextmanager
def recording(modules: Mapping[str, nn.Module], names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the outputs of the named modules, call after call, as they were returned; gradients pass.

    They are copies: the network may go on and change an output in place.
    """
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}

    def recorder(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: object, output: Tensor) -> None:
            with unseen():
                outputs[name].append(output.clone())

        return hook

    with Hooks() as hooks:
        for name in names:
            hooks.after(modules[name], recorder(name))
        yield outputs


def inputs_of(module: nn.Module, calls: int, run: Callable[[], object]) -> list[Tensor]:
    """Return what ``module`` is called with, call after call, and stop before its last call runs.

    Args:
        module: A module that is called with one tensor, by position or by keyword.
        calls: How often one forward pass calls it.
        run: Makes that forward pass.
    """
    seen: list[Tensor] = []

    def before(_: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        given = first_tensor(args, kwargs)
        if given is None:
            raise TypeError(f"{type(module).__name__} is called without a tensor")
        with unseen():
            seen.append(given.detach().clone())
        if len(seen) == calls:
            raise _Reached

    with Hooks() as hooks:
        hooks.before(module, before, with_kwargs=True)
        _run_until_reached(run)
    return seen


def outputs_of(module: nn.Module, calls: int, run: Callable[[], object]) -> list[Tensor]:
    """Return what ``module`` returns, call after call, and stop after its last call; gradients pass."""
    seen: list[Tensor] = []

    def after(_: nn.Module, args: object, output: Tensor) -> None:
        with unseen():
            seen.append(output.clone())
        if len(seen) == calls:
            raise _Reached

    with Hooks() as hooks:
        hooks.after(module, after)
        _run_until_reached(run)
    return seen


def _run_until_reached(run: Callable[[], object]) -> None:
    try:
        run()
    except _Reached:
        pass
