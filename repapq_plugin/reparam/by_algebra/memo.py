"""Results that are computed once, refusals among them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from repapq_plugin.errors import MergeError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Memo(Generic[K, V]):
    """Remembers values by key; a computation that was refused is refused again with the same error."""

    def __init__(self) -> None:
        self._known: dict[K, V | MergeError] = {}

    def get(self, key: K, compute: Callable[[], V]) -> V:
        """Return the value of ``key``, computed at the first request.

        Raises:
            MergeError: ``compute`` raised it, now or before.
        """
        if key not in self._known:
            try:
                self._known[key] = compute()
            except MergeError as failure:
                self._known[key] = failure
        found = self._known[key]
        if isinstance(found, MergeError):
            raise found
        return found

    def values(self) -> list[V]:
        """Return the values so far, without the refusals."""
        return [value for value in self._known.values() if not isinstance(value, MergeError)]

    def clear(self) -> None:
        """Forget everything."""
        self._known.clear()
