"""Ranges from the smallest to the largest value seen."""

from __future__ import annotations

import torch
from torch import Tensor

from repapq_plugin.observers.base import RangeObserver, register_observer


@register_observer("min_max")
class MinMaxObserver(RangeObserver):
    """Per tensor: everything that was seen fits; one outlier makes every step coarse."""

    def observe(self, x: Tensor) -> None:
        """Widen the range to hold ``x``."""
        low, high = torch.aminmax(x)
        self._widen(low.float(), high.float())


@register_observer("per_channel_min_max")
class PerChannelMinMaxObserver(RangeObserver):
    """One range per slice along ``ch_axis``; ``min_val`` and ``max_val`` are ``(channels,)``."""

    per_channel = True

    def observe(self, x: Tensor) -> None:
        """Widen each channel's range to hold its slice of ``x``."""
        low, high = torch.aminmax(self._rows(x), dim=1)
        self._widen(low, high)

    def _rows(self, x: Tensor) -> Tensor:
        return x.movedim(self.ch_axis, 0).reshape(x.shape[self.ch_axis], -1).float()
