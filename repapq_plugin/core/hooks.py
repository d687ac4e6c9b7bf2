"""Forward hooks of modules that always come off again, also when putting one of them on fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType

import torch
from torch import nn


class Hooks:
    """Puts hooks on modules inside a ``with`` block and takes all of them off at its end.

    ``with Hooks() as hooks: hooks.after(module, see); run()``

    Scripted modules take no hooks from Python and get none; nothing in them is quantized.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()

    def before(
        self, module: nn.Module, hook: Callable[..., object], *, with_kwargs: bool = False, first: bool = False
    ) -> None:
        """Call ``hook(module, args)`` before each forward, or ``hook(module, args, kwargs)``.

        What it returns replaces ``args``, or both. With ``first`` it runs before the hooks that are there already.
        """
        if not isinstance(module, torch.jit.ScriptModule):
            self._stack.callback(module.register_forward_pre_hook(hook, with_kwargs=with_kwargs, prepend=first).remove)

    def after(
        self, module: nn.Module, hook: Callable[..., object], *, with_kwargs: bool = False, first: bool = False
    ) -> None:
        """Call ``hook(module, args, output)`` after each forward, or ``hook(module, args, kwargs, output)``.

        With ``first`` it sees what the forward itself returned, and hooks that are there already come behind it.
        """
        if not isinstance(module, torch.jit.ScriptModule):
            self._stack.callback(module.register_forward_hook(hook, with_kwargs=with_kwargs, prepend=first).remove)

    def __enter__(self) -> Hooks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


@contextmanager
def other_forwards(forwards: Mapping[nn.Module, Callable[..., object]]) -> Iterator[None]:
    """Let modules run other forwards for a while.

    Unlike a hook this is not noticed by networks that go another way where hooks are (torch's transformer encoders).

    Args:
        forwards: What each module is to run, with the arguments of its own forward.
    """
    before = [(module, vars(module).get("forward")) for module in forwards]
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, own in before:
            if own is None:
                vars(module).pop("forward", None)  # the class's forward shows again
            else:
                vars(module)["forward"] = own


def unseen() -> AbstractContextManager[None]:
    """Keep what a hook computes from whoever watches a network's functions (`torch.overrides` modes)."""
    return torch._C.DisableTorchFunction()
