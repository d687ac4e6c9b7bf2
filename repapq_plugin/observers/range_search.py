"""The search for the range of least error: which ranges are tried; what an error is, each observer says."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from repapq_plugin.config import LossName
from repapq_plugin.core.losses import Alike, sample_magnitudes, sample_sizes
from repapq_plugin.core.quant_primitives import choose_qparams
from repapq_plugin.observers.histogram import HistogramOptions, HistogramRangeObserver

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass
class _Waiting:
    """A call that was seen before it is known how much its samples count.

    Args:
        sizes: Of its samples, float64 ``(samples,)``.
        exponents: The different powers of two that are nearest to those, ``(exponents,)``.
        counts: How many values of samples of each exponent lie in each bin, float64 ``(exponents, bins)``.
        sums: Their sums.
        radius: Of the histogram at that time.
    """

    sizes: Tensor
    exponents: Tensor
    counts: Tensor
    sums: Tensor
    radius: float


class SearchedRangeObserver(HistogramRangeObserver):
    """Searches the range whose quantization error is smallest on the histogram.

    Each sample's error counts relative to its own magnitude (`core.losses.relative_loss`), to the nearest power of
    two: one image that is many times as large as all others would stretch the range for itself (our choice). An
    observer sees calls, not passes: each level of a feature pyramid that one layer reads counts alike as well, the
    quiet ones too. ``auto`` finds out where that is wrong.

    Upper and lower bound move in turn, first over fractions of the observed bounds, then twice over
    fractions of twice the value found: so the search stays fine behind an outlier of any size. What was
    found is always tried again, and the full min-max range first of all, so the result is never worse
    than it under its own measure.

    Args:
        candidates: Number of evenly spaced fractions tried for a bound in one pass; half as many more
            are spaced by a ratio, down to a ten-thousandth.
        **kwargs: See `HistogramRangeObserver`.
    """

    def __init__(self, candidates: int = 100, **kwargs: Unpack[HistogramOptions]) -> None:
        super().__init__(**kwargs)
        self.candidates = candidates
        self._waiting: list[_Waiting] | None = None

    loss: LossName
    """What an error is measured by."""

    def observe(self, x: Tensor) -> None:
        """Add the values of ``x`` to the histogram, at once or when `settle` is called."""
        if self._waiting is None:
            super().observe(x)
            return
        flat, index = self._binned(x)
        sizes = sample_sizes(x.detach().double(), self.loss)
        exponents, place = torch.unique(_exponents(sizes), return_inverse=True)
        index += self.bins * place.repeat_interleave(x.numel() // len(sizes))
        number = self.bins * len(exponents)
        counts, sums = (
            torch.bincount(index, weights=weights, minlength=number).double().reshape(-1, self.bins)
            for weights in (None, flat)
        )
        self._waiting.append(_Waiting(sizes, exponents, counts, sums, float(self.radius)))

    def apart(self) -> None:
        """See `RangeObserver`: how much a sample counts depends on those of all ranks."""
        self._waiting = []

    def sizes(self) -> list[Tensor]:
        """See `RangeObserver`."""
        return [call.sizes for call in self._waiting or ()]

    def settle(self, sizes: Sequence[Sequence[Tensor]]) -> None:
        """See `RangeObserver`."""
        for call, of_ranks in zip(self._waiting or (), sizes, strict=False):
            while call.radius < float(self.radius):
                self._halve(call.counts)
                self._halve(call.sums)
                call.radius *= 2
            floor = _exponents(torch.tensor(Alike.of(of_ranks).floor, dtype=torch.float64))
            weights = torch.exp2(-torch.maximum(call.exponents, floor.to(call.exponents)))
            self.counts += (weights[:, None] * call.counts).sum(0)
            self.sums += (weights[:, None] * call.sums).sum(0)
        if self._waiting:
            self._waiting = []

    def weights_of(self, x: Tensor) -> Tensor:
        """Return one over the magnitude of the sample that a value belongs to, a power of two."""
        magnitudes = sample_magnitudes(x.detach().double(), self.loss)
        weights = torch.exp2(-_exponents(magnitudes))
        return weights.repeat_interleave(x.numel() // len(weights))

    @abstractmethod
    def measure(self, deviation: Tensor) -> Tensor:
        """Return what deviations ``x_hat - x`` cost, float64, of the same shape; their mean is minimised."""

    def range_error(self, low: Tensor, high: Tensor) -> Tensor:
        """Return the mean of `measure` over everything seen, for each of ``n`` ranges.

        Args:
            low: Lower bounds, float, ``(n,)``.
            high: Upper bounds, float, ``(n,)``.

        Returns:
            Errors, float64, ``(n,)``.
        """
        values, counts = self.points()
        # In float32, as the answer will be: a zero point that rounds the other way is another grid.
        scale, zero_point = choose_qparams(
            low.float(), high.float(), self.quant_min, self.quant_max, symmetric=self.symmetric
        )
        scale, zero = scale.double()[:, None], zero_point.double()[:, None]
        # In place: there are as many numbers as bins times ranges, and fresh memory costs more than the arithmetic.
        codes = torch.div(values, scale).round_().add_(zero).clamp_(self.quant_min, self.quant_max)
        error = self.measure(codes.sub_(zero).mul_(scale).sub_(values))
        return (error * counts).sum(1) / counts.sum()

    def find_range(self) -> tuple[Tensor, Tensor]:
        """Return the searched range, float32 scalars."""
        low, high = self.min_val.double().clamp(max=0), self.max_val.double().clamp(min=0)
        if self.symmetric:
            low, high = -torch.maximum(-low, high), torch.maximum(-low, high)
        full_low, full_high = low, high
        for spread in (1.0, 2.0, 2.0):
            highs = self._tried(high, full_high, spread)
            if self.symmetric:
                high = highs[self.range_error(-highs, highs).argmin()]
                low = -high
                continue
            high = highs[self.range_error(low.expand_as(highs), highs).argmin()]
            lows = self._tried(low, full_low, spread)
            low = lows[self.range_error(lows, high.expand_as(lows)).argmin()]
        return low.float(), high.float()

    def _tried(self, bound: Tensor, full: Tensor, spread: float) -> Tensor:
        """Return ``bound`` itself and fractions of ``spread`` times it, none beyond ``full``."""
        if full == 0:
            return bound[None]
        even = torch.linspace(1.0, 1.0 / self.candidates, self.candidates)
        fractions = torch.cat([even, torch.logspace(0, -4, self.candidates // 2)]).to(bound)
        magnitudes = (bound.abs() * spread * fractions).clamp(max=full.abs())
        return torch.cat([bound[None], magnitudes * torch.sign(full)])


def _exponents(sizes: Tensor) -> Tensor:
    """Return the exponents of the powers of two that are nearest to positive numbers."""
    return torch.round(torch.log2(sizes))
