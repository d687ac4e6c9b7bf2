"""What is known of single tensors during a run, kept by identity and only as long as they live."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

from torch import Tensor

N = TypeVar("N")


class TensorNotes(Generic[N]):
    """A note per tensor object; equal tensors are different ones, and no tensor is kept alive.

    A tensor that is changed in place keeps its note until another is put.
    """

    def __init__(self) -> None:
        self._notes: dict[int, tuple[weakref.ref[Tensor], N]] = {}

    def put(self, tensor: Tensor, note: N) -> None:
        """Note something of a tensor, in place of what was noted before."""
        self._notes[id(tensor)] = (weakref.ref(tensor), note)

    def forget(self, tensor: object) -> None:
        """Drop what was noted of a tensor."""
        self._notes.pop(id(tensor), None)

    def get(self, tensor: object) -> N | None:
        """Return what was noted of a tensor, or ``None``."""
        found = self._notes.get(id(tensor))
        # An id may belong to a new tensor by now, so the tensor itself decides.
        return found[1] if found is not None and found[0]() is tensor else None
