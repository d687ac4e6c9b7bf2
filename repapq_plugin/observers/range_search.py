"""The search for the range of least error: which ranges are tried; what an error is, each observer says."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from repapq_plugin.config import LossName
from repapq_plugin.core.losses import sample_magnitudes
from repapq_plugin.core.quant_primitives import choose_qparams
from repapq_plugin.observers.histogram import HistogramOptions, HistogramRangeObserver

if TYPE_CHECKING:
    from typing_extensions import Unpack


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

    loss: LossName
    """What an error is measured by."""

    def weights_of(self, x: Tensor) -> Tensor:
        """Return one over the magnitude of the sample that a value belongs to, a power of two."""
        magnitudes = sample_magnitudes(x.detach().double(), self.loss)
        weights = torch.exp2(-torch.round(torch.log2(magnitudes)))
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
