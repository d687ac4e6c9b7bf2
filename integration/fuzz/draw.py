"""Choices that follow from one integer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

WIDTHS = (1, 2, 3, 4, 6, 8)
"""Channels of a layer."""


class Draw:
    """Draws from one seed: the same on every machine, as Python keeps the numbers of its generator.

    Args:
        seed: Of everything that is drawn.
    """

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def chance(self, share: float) -> bool:
        """Whether something happens that happens in this share of all cases."""
        return self._random.random() < share

    def of(self, *options: T) -> T:
        """Return one of some options."""
        return options[self._random.randrange(len(options))]

    def weighted(self, options: Sequence[tuple[T, float]]) -> T:
        """Return one of some options with their weights."""
        return self._random.choices([one for one, _ in options], [weight for _, weight in options])[0]

    def whole(self, low: int, high: int) -> int:
        """Return a whole number from ``low`` to ``high``, both included."""
        return self._random.randint(low, high)

    def number(self, low: float, high: float) -> float:
        """Return a number between two."""
        return self._random.uniform(low, high)

    def width(self) -> int:
        """Return a number of channels."""
        return self.of(*WIDTHS)
