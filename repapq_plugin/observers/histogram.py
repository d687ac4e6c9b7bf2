"""Everything that was seen, as a histogram: the memory of the observers that look at more than the extremes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from repapq_plugin.errors import ConfigError
from repapq_plugin.observers.base import RangeObserver, RangeOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

MIN_EXPONENT = -126
"""A histogram reaches at least to two to this power, so that one of zeros alone has a width."""


class HistogramOptions(RangeOptions, total=False):
    """What `HistogramRangeObserver` takes, all by keyword."""

    bins: int


class HistogramRangeObserver(RangeObserver):
    """Keeps a histogram of everything seen, in memory that does not grow with the number of batches.

    The histogram covers ``[-R, R)`` where ``R``, a power of two, doubles when a larger value arrives;
    two neighbouring bins then become one, so counts stay exact, and the same in whatever order the
    batches come. Each bin also sums its values: its mean stands for it, and a bin of exact zeros
    (behind a ReLU) keeps an exact representative.

    Args:
        bins: Number of bins over ``[-R, R]``, a multiple of 4.
        **kwargs: See `RangeObserver`.

    Raises:
        ConfigError: A value is not allowed.
    """

    counts: Tensor
    sums: Tensor
    radius: Tensor

    def __init__(self, bins: int = 8192, **kwargs: Unpack[RangeOptions]) -> None:
        super().__init__(**kwargs)
        if bins < 64 or bins % 4:
            raise ConfigError(f"bins={bins} is not allowed; choose a multiple of 4, at least 64.")
        self.bins = bins
        self.register_buffer("counts", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("radius", torch.zeros((), dtype=torch.float64))

    def observe(self, x: Tensor) -> None:
        """Add the values of ``x`` to the histogram."""
        flat, index = self._binned(x)
        weights = self.weights_of(x)
        self.counts += torch.bincount(index, weights=weights, minlength=self.bins).to(self.counts)
        self.sums += torch.bincount(index, weights=flat if weights is None else flat * weights, minlength=self.bins).to(
            self.sums
        )

    def _binned(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Widen the histogram to hold ``x``; return its values, float64, and their bins, ``(values,)`` each."""
        low, high = torch.aminmax(x)
        self._widen(low.float(), high.float())
        reach = float(torch.maximum(-low, high))
        if float(self.radius) == 0:
            self.radius.fill_(2.0 ** max(math.frexp(reach)[1] if reach else MIN_EXPONENT, MIN_EXPONENT))
        while reach >= float(self.radius):
            self._double()
        flat = x.reshape(-1).double()
        return flat, torch.floor(flat / self.radius * (self.bins / 2)).long() + self.bins // 2

    def extremes(self) -> Tensor:
        """See `RangeObserver`; and the radius."""
        return torch.cat([super().extremes(), self.radius.reshape(1)])

    def set_extremes(self, values: Tensor) -> None:
        """See `RangeObserver`."""
        super().set_extremes(values)
        if float(self.radius) == 0:
            self.radius.copy_(values[2])
        while float(self.radius) < float(values[2]):
            self._double()

    def totals(self) -> list[Tensor]:
        """See `RangeObserver`."""
        return [self.counts, self.sums]

    def weights_of(self, x: Tensor) -> Tensor | None:
        """Return how much each value of ``x`` counts, float64 ``(values,)``; ``None``: all alike.

        Powers of two keep the sums exact, whatever the order of the batches.
        """
        return None

    def _double(self) -> None:
        for buffer in (self.counts, self.sums):
            self._halve(buffer)
        self.radius *= 2

    def _halve(self, buffer: Tensor) -> None:
        """Let two neighbouring bins of a ``(..., bins)`` become one, in place: it then covers twice as much."""
        quarter = self.bins // 4
        halved = buffer.reshape(*buffer.shape[:-1], -1, 2).sum(-1)
        buffer.zero_()
        buffer[..., quarter : quarter + halved.shape[-1]] = halved

    def reset_min_max_vals(self) -> None:
        """Forget everything observed."""
        super().reset_min_max_vals()
        for buffer in (self.counts, self.sums, self.radius):
            buffer.zero_()

    def points(self) -> tuple[Tensor, Tensor]:
        """Return representatives and counts of the filled bins, float64, ``(filled,)`` each."""
        filled = self.counts > 0
        counts = self.counts[filled]
        return self.sums[filled] / counts, counts
