"""Ranges that hold a given share of the values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from repapq_plugin.errors import ConfigError
from repapq_plugin.observers.base import register_observer
from repapq_plugin.observers.histogram import HistogramOptions, HistogramRangeObserver

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register_observer("percentile")
class PercentileObserver(HistogramRangeObserver):
    """Per tensor: cuts the same share of values off both ends.

    Args:
        percentile: Share of values at or below the upper bound, in percent, 50 to 100; the lower
            bound is its mirror image.
        **kwargs: See `HistogramRangeObserver`.

    Raises:
        ConfigError: A value is not allowed.
    """

    def __init__(self, percentile: float = 99.99, **kwargs: Unpack[HistogramOptions]) -> None:
        super().__init__(**kwargs)
        if not 50 <= percentile <= 100:
            raise ConfigError(f"percentile={percentile} is not allowed; choose a number from 50 to 100.")
        self.percentile = percentile

    def find_range(self) -> tuple[Tensor, Tensor]:
        """Return the bounds, float32 scalars; never wider than what was seen."""
        if self.percentile == 100:
            return self.min_val, self.max_val
        values, counts = self.points()
        share = counts.cumsum(0) / counts.sum()
        outside = 1 - self.percentile / 100
        last = values.numel() - 1
        low = values[int(torch.searchsorted(share, outside).clamp(max=last))]
        high = values[int(torch.searchsorted(share, 1 - outside).clamp(max=last))]
        return (
            torch.maximum(low.float(), self.min_val),
            torch.minimum(high.float(), self.max_val),
        )
