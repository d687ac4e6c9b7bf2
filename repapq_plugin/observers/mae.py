"""Ranges of least mean absolute error (MAE), RepAPQ's measure (arXiv:2402.16121, abstract).

The range of a tensor ``x`` is the one that minimises ``E |x - x_hat|``, where ``x_hat`` is ``x`` rounded to
the grid of that range and clamped to it, and the mean is over everything that calibration shows.

A range has to trade two errors. A wide one makes every step coarse, and the error of rounding grows for all
values; a narrow one clamps the values outside it. The usual measure, the mean squared error, weighs a clamped
value by the square of its distance to the range, so that a single one far out stretches the range. Here it
weighs by the distance alone, and the bulk decides: at 8 bits, one value of 100 among a hundred thousand of
half a normal distribution is cut with MAE and kept with MSE.

Meant for activations, whose outliers appear in few samples or channels. Weights do not use it: in a kernel
merged from branches, the identity's one large tap stands among many small ones, and it is no outlier but what
carries the signal. MAE would clip it. So there is no variant per channel, and weights take the squared error
of ``mse.py`` (our choice).
"""

from __future__ import annotations

from torch import Tensor

from repapq_plugin.observers.base import register_observer
from repapq_plugin.observers.range_search import SearchedRangeObserver


@register_observer("mae")
class MAEObserver(SearchedRangeObserver):
    """Per tensor: the range that minimises ``E |x - x_hat| / E |x|``, the mean over all samples seen."""

    loss = "mae"

    def measure(self, deviation: Tensor) -> Tensor:
        """Return ``|x_hat - x|``, float64, of ``deviation``'s shape."""
        return deviation.abs()
