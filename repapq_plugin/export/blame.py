"""Errors of an export: which layer they are about, and what to do."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from repapq_plugin.core.hooks import Hooks
from repapq_plugin.core.running import is_out_of_memory
from repapq_plugin.errors import ExportError, RepAPQError

LONGEST = 400
"""Characters of a foreign error's text that are repeated; the whole of it stays its cause."""


class Running:
    """Knows inside a ``with`` block which module of a model runs, also after an error has ended it.

    Args:
        model: Gets hooks for the time of the block.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._hooks = Hooks()
        self._stack: list[str] = []

    @property
    def path(self) -> str:
        """Path of the innermost module that was entered and not left; empty for the model itself."""
        return self._stack[-1] if self._stack else ""

    def __enter__(self) -> Running:
        for name, module in self._model.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule):
                self._watch(name, module)
        return self

    def _watch(self, name: str, module: nn.Module) -> None:
        def enter(_: nn.Module, args: tuple[object, ...]) -> None:
            self._stack.append(name)

        def leave(_: nn.Module, args: tuple[object, ...], output: object) -> None:
            while self._stack and self._stack.pop() != name:  # an error that the model caught ended those above
                pass

        self._hooks.before(module, enter)
        self._hooks.after(module, leave)

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(None, None, None)


def brief(error: Exception) -> str:
    """Return the first paragraph of an error's text in one line, shortened."""
    text = " ".join(str(error).strip().split("\n\n")[0].split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


@contextmanager
def explained(failure: str, remedy: str = "", where: Callable[[Exception], str] | None = None) -> Iterator[None]:
    """Turn whatever fails inside into an `ExportError` that names the layer; full memory is passed on as it is.

    Args:
        failure: What cannot be done, the beginning of the message: ``"The model cannot run"``.
        remedy: What to do, a sentence.
        where: Says for an error at which layer it came up, by its path; empty where that is not known.

    Raises:
        ExportError: Anything failed; errors of this package are passed on.
    """
    try:
        yield
    except RepAPQError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        path = where(error) if where is not None else ""
        at = f", in {path!r}" if path else ""
        text = f"{failure}{at}: {type(error).__name__}: {brief(error)}"
        raise ExportError(f"{text.rstrip('.')}. {remedy}" if remedy else text) from error


def layer_in(text: str, model: nn.Module) -> str:
    """Return the path of the module of ``model`` that a text about a traced graph points at; empty for none.

    Nodes of such a graph are named by the modules that ran: ``/head/head.0/Conv``.
    """
    modules = dict(model.named_modules())
    for name in re.findall(r"(?:/[\w.]+)+", text):
        path = ""
        for part in name.split("/")[1:]:
            inner = _called(part, path, modules)
            if inner is None:
                break
            path = inner
        if path:
            return path
    return ""


def _called(part: str, path: str, modules: Collection[str]) -> str | None:
    """Return the one module inside ``path`` that a part of a node's name can mean; None for none or several.

    Containers that are not called themselves are left out of the name, and inside one that is called a name starts
    again with the container's own: ``/head/head.0`` for ``branches.head.0``.
    """
    start = f"{path}." if path else ""
    if f"{start}{part}" in modules:
        return f"{start}{part}"
    inside = [name for name in modules if name.startswith(start) and f".{name}".endswith(f".{part}")]
    return inside[0] if len(inside) == 1 else None


def layer_with_operator(text: str, model: nn.Module, inputs: tuple[Tensor, ...]) -> str:
    """Return the path of the first module that runs the operator that a text of torch's exporter names.

    Args:
        text: Holds the name, ``'aten::special_bessel_j0'``.
        model: Is traced once more.
        inputs: What to trace it on.

    Returns:
        Empty if it names none, or no module is found.
    """
    named = re.search(r"'(\w+::\w+)'", text)
    if named is None:
        return ""
    with suppress(Exception):  # it is about a better message for an error that has happened already
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(model, inputs, check_trace=False)  # type: ignore[no-untyped-call]
        for node in traced.inlined_graph.nodes():
            if node.kind() == named.group(1):
                return str(node.scopeName()).rsplit("/", 1)[-1].removeprefix("__module.").removeprefix("__module")
    return ""
