"""Watching the tensor functions of a run."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from repapq_plugin.core.tensor_notes import TensorNotes
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


SHAPES_ONLY = {"reshape_as", "view_as", "expand_as", "type_as"}
"""Functions that take nothing but shape or dtype from what they are given besides the first tensor."""

MAKERS_OF_OTHERS = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"} | {
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"),
}
"""Functions that take nothing but shape, dtype or device from a tensor."""


class MakersWatch(FunctionWatch):
    """Knows which layer made a tensor, and which layers' outputs were read by more than the modules that report it.

    Layers report through hooks what they made. A module that reads such an output and may do so puts it into
    ``reading`` as long as it runs; whatever else computes with an output has used it elsewhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[nn.Module] = Counter()
        """How often each layer ran, in the order of the first calls."""
        self.used_elsewhere: set[nn.Module] = set()
        """Layers whose outputs something else read."""
        self.reading: list[Tensor] = []
        self._makers: TensorNotes[nn.Module] = TensorNotes()

    def maker_of(self, tensor: object) -> nn.Module | None:
        """Return the layer whose output ``tensor`` is; None for every other value."""
        return self._makers.get(tensor)

    def made(self, layer: nn.Module, output: object) -> None:
        """Note the output of a layer, or what counts as it; only a tensor can be followed."""
        if isinstance(output, Tensor):
            self._makers.put(output, layer)

    def note_use(self, values: object) -> None:
        """Note that tensors are computed with, or returned."""
        for tensor in tensors_of(values):
            layer = None if any(tensor is read for read in self.reading) else self.maker_of(tensor)
            if layer is not None:
                self.used_elsewhere.add(layer)

    def after(
        self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object], result: object, note: object
    ) -> None:
        """Every argument is used whose values are."""
        if name not in MAKERS_OF_OTHERS:
            self.note_use(args[:1] if name in SHAPES_ONLY else [args, kwargs])
