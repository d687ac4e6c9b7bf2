"""Running a part of an NNCF model alone, with its hooks on, exactly as inside the whole model.

NNCF finds the hooks of an operation by a name made from the modules that are being called and a counter of like
operations. Neither belongs to the operation: a module of a ``ModuleList`` is known by its index alone, and shares its
counter with its neighbours in other lists. So one pass of the whole model is watched first, and what it showed is
brought back whenever a part runs by itself or is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from repapq_plugin.core.hooks import Hooks
from repapq_plugin.hosts.nncf._compat import FunctionHookMode, current_mode, get_hook_storage, set_counters


@dataclass(frozen=True)
class Call:
    """One call of a module in a pass of the whole model.

    Args:
        around: The modules that were being called around it, outermost first, without the model.
        before: NNCF's counters of operations when it began.
        after: The same when it ended.
    """

    around: tuple[nn.Module, ...]
    before: Mapping[str, int]
    after: Mapping[str, int]


def watch_calls(model: nn.Module, names: Collection[str], run: Callable[[], object]) -> dict[str, list[Call]]:
    """Return how one pass of ``model`` calls the named modules.

    Args:
        model: A model with NNCF's hooks.
        names: Module paths.
        run: Makes the pass.
    """
    calls: dict[str, list[Call]] = {name: [] for name in names}
    begun: list[tuple[tuple[nn.Module, ...], dict[str, int]]] = []

    def before(module: nn.Module, args: object) -> None:
        mode = current_mode(model)
        if mode is not None:
            begun.append((tuple(mode.module_call_stack[1:-1]), dict(mode.op_calls)))

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            mode = current_mode(model)
            if mode is not None:
                calls[name].append(Call(*begun.pop(), dict(mode.op_calls)))

        return hook

    with Hooks() as hooks, torch.no_grad():
        for name in calls:
            module = model.get_submodule(name)
            hooks.before(module, before)
            hooks.after(module, after(name))
        run()
    return calls


@contextmanager
def counting_skipped(model: nn.Module, calls: Mapping[str, Sequence[Call]]) -> Iterator[None]:
    """Let modules that answer from a cache leave NNCF's counters as if they had run.

    Without it, the operations behind a skipped module would be taken for those inside it.
    """
    done: WeakKeyDictionary[FunctionHookMode, dict[str, int]] = WeakKeyDictionary()

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            mode = current_mode(model)
            if mode is None:
                return
            counts = done.setdefault(mode, {})
            index = counts.get(name, 0)
            counts[name] = index + 1
            set_counters(mode, calls[name][index].after)

        return hook

    with Hooks() as hooks:
        for name in calls:
            hooks.after(model.get_submodule(name), after(name))
        yield


def run_alone(model: nn.Module, name: str, inputs: Sequence[Tensor], calls: Sequence[Call]) -> list[Tensor]:
    """Run one module of ``model`` with NNCF's hooks on, call after call; gradients pass.

    Args:
        model: A model with NNCF's hooks.
        name: Module path.
        inputs: What each call is given; each must be its own tensor, as the module may work in place.
        calls: How the whole model calls it, from `watch_calls`.

    Returns:
        The outputs, the same as inside the model (difference 0.0).
    """
    module = model.get_submodule(name)
    outputs = []
    # One mode for all calls, as in the whole model: weights that several calls read are quantized once in it.
    with FunctionHookMode(model=model, hook_storage=get_hook_storage(model)) as mode:
        for x, call in zip(inputs, calls, strict=True):
            set_counters(mode, call.before)
            for outer in call.around:
                mode.push_module_call_stack(outer)
            outputs.append(module(x))
            for _ in call.around:
                mode.pop_module_call_stack()
    return outputs
