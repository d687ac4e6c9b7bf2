"""Watching the tensor functions of a run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from torch.overrides import TorchFunctionMode

from repapq_plugin.core.tensors import tensors_of


class FunctionWatch(TorchFunctionMode):
    """Sees every tensor function that runs inside a ``with`` block, before and after."""

    def before(self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        """Read the arguments before the function may overwrite them; what is returned goes to `after`."""
        return None

    @abstractmethod
    def after(
        self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object], result: object, note: Any
    ) -> None:
        """Take note of a call that returned ``result``.

        Args:
            name: Name of the function: ``"add"``.
            args: Its arguments; those that it worked on in place are changed by now.
            kwargs: Its keyword arguments.
            result: What it returned; holds at least one tensor.
            note: What `before` returned.
        """

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        note = self.before(name, args, kwargs)
        result = func(*args, **kwargs)
        if tensors_of(result):  # reading a shape or a dtype gives none
            self.after(name, args, kwargs, result, note)
        return result
