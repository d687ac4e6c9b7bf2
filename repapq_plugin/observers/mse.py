"""Ranges of least mean squared error (MSE): ``E (x - x_hat)**2``.

The usual measure, and the one for weights. Large values weigh most in it, and in a merged kernel they are what
carries the signal: the identity's tap. Activations with outliers are what ``mae.py`` is for.

Two searches, for two kinds of tensors. Activations come batch by batch, so theirs is done on a histogram of
everything seen. A weight comes whole, so each of its channels is searched on the values themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from repapq_plugin.core.quant_primitives import choose_qparams, fake_quantize
from repapq_plugin.observers.base import RangeOptions, register_observer
from repapq_plugin.observers.min_max import PerChannelMinMaxObserver
from repapq_plugin.observers.range_search import SearchedRangeObserver

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register_observer("mse")
class MSEObserver(SearchedRangeObserver):
    """Per tensor: the range that minimises ``E (x - x_hat)**2 / E x**2``, the mean over all samples seen."""

    loss = "mse"

    def measure(self, deviation: Tensor) -> Tensor:
        """Return ``(x_hat - x)**2``, float64, of ``deviation``'s shape."""
        return deviation.square()


@register_observer("per_channel_mse")
class PerChannelMSEObserver(PerChannelMinMaxObserver):
    """Per channel: for weights, which arrive whole in one call; the last tensor seen is searched.

    Args:
        candidates: Number of fractions of the min-max range tried, evenly down to a fifth.
        **kwargs: See `RangeObserver`.
    """

    def __init__(self, candidates: int = 80, **kwargs: Unpack[RangeOptions]) -> None:
        super().__init__(**kwargs)
        self.candidates = candidates
        self.register_buffer("best", torch.tensor([]))

    def observe(self, x: Tensor) -> None:
        """Widen the ranges to hold ``x`` and search each channel's best fraction of its range."""
        super().observe(x)
        rows = self._rows(x)
        errors = []
        fractions = torch.linspace(1.0, 0.2, self.candidates, device=x.device)
        for fraction in fractions:
            scale, zero_point = choose_qparams(
                self.min_val * fraction,
                self.max_val * fraction,
                self.quant_min,
                self.quant_max,
                symmetric=self.symmetric,
            )
            hat = fake_quantize(rows, scale, zero_point, self.quant_min, self.quant_max, 0)
            errors.append((hat - rows).square().mean(1))
        self.best = fractions[torch.stack(errors).argmin(0)]

    def find_range(self) -> tuple[Tensor, Tensor]:
        """Return the searched ranges, float32 ``(channels,)`` each."""
        return self.min_val * self.best, self.max_val * self.best
