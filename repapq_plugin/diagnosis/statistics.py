"""Figures of channels, summed up batch by batch: memory does not grow with what was seen.

The one exception is the largest value of each channel in each sample: one number each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 512
"""Of each channel's histogram of magnitudes: shares of a range are exact to a 256th of it."""

TOP = 0.001
"""Share of the values, the largest in magnitude, whose part of the range is told."""


@dataclass(frozen=True)
class Figures:
    """What was found of one tensor, or of each of its channels, float64 ``(channels,)`` each.

    Args:
        maximum: Largest absolute value.
        kurtosis: Fourth moment about the mean over the squared variance (Pearson): 3 for a normal distribution, more
            with outliers; NaN for a constant.
        top_share: Part of the range from 0 to the maximum that only the largest 0.1 % of the magnitudes use.
        snr: Signal over noise of the quantized values, in decibels; infinite without any noise, NaN without signal or
            where nothing was quantized.
        power: Mean square.
        variance: Mean square about the mean.
        noise: Mean square of what quantizing changes; NaN where nothing was quantized.
    """

    maximum: Tensor
    kurtosis: Tensor
    top_share: Tensor
    snr: Tensor
    power: Tensor
    variance: Tensor
    noise: Tensor


class ChannelStatistics:
    """Sums up the values of channels.

    Args:
        channels: How many.
        device: Where.
    """

    def __init__(self, channels: int, device: torch.device | None = None) -> None:
        self._count = torch.zeros(channels, dtype=torch.float64, device=device)
        self._shift: Tensor | None = None
        self._powers = torch.zeros(4, channels, dtype=torch.float64, device=device)
        self._histogram = torch.zeros(channels, BINS, dtype=torch.int64, device=device)
        self._radius = torch.zeros(channels, dtype=torch.float64, device=device)
        self._signal, self._noise = torch.zeros_like(self._count), torch.zeros_like(self._count)
        self._rounded = 0
        self.low, self.high = torch.full_like(self._count, math.inf), torch.full_like(self._count, -math.inf)

    def add(self, values: Tensor) -> None:
        """Take in values, floating ``(samples, channels, values)``."""
        x = values.detach().double().transpose(0, 1).flatten(1)
        if not x.shape[1]:
            return
        if self._shift is None:
            self._shift = x.mean(1)  # about the mean, so that nothing cancels in the moments
        away = x - self._shift[:, None]
        power = torch.ones_like(away)
        for order in range(4):
            power *= away
            self._powers[order] += power.sum(1)
        self._count += x.shape[1]
        self.low, self.high = torch.minimum(self.low, x.amin(1)), torch.maximum(self.high, x.amax(1))
        self._add_magnitudes(x.abs())

    def _add_magnitudes(self, x: Tensor) -> None:
        reach = x.amax(1)
        first = (self._radius == 0) & (reach > 0)
        # A power of two above the largest value: neighbours become one where it doubles, and counts stay exact.
        self._radius[first] = torch.exp2(torch.floor(torch.log2(reach[first])) + 1)
        while bool((wide := (reach >= self._radius) & (reach > 0)).any()):
            halved = self._histogram[wide].reshape(-1, BINS // 2, 2).sum(2)
            self._histogram[wide] = torch.cat((halved, torch.zeros_like(halved)), 1)
            self._radius[wide] *= 2
        width = torch.where(self._radius > 0, self._radius, 1.0) / BINS
        places = (x / width[:, None]).long().clamp_(max=BINS - 1)
        places += torch.arange(len(x), device=x.device)[:, None] * BINS
        self._histogram += torch.bincount(places.flatten(), minlength=self._histogram.numel()).reshape(-1, BINS)

    def add_noise(self, values: Tensor, quantized: Tensor) -> None:
        """Take in values and what their quantizer makes of them, both ``(samples, channels, values)``."""
        x = values.detach().double()
        self._signal += x.square().sum((0, 2))
        self._noise += (quantized.detach().double() - x).square().sum((0, 2))
        self._rounded += x.shape[0] * x.shape[2]

    @property
    def by_channel(self) -> Figures:
        """Figures of each channel."""
        mean = self._mean_powers
        variance = mean[1] - mean[0] ** 2
        fourth = mean[3] - 4 * mean[0] * mean[2] + 6 * mean[0] ** 2 * mean[1] - 3 * mean[0] ** 4
        spread = variance > 1e-12 * mean[1].clamp_min(1e-300)
        kurtosis = torch.where(spread, fourth / variance.square(), math.nan)
        top = _top_shares(self._histogram, self._radius, self._maximum)
        shift = torch.zeros_like(self._count) if self._shift is None else self._shift
        power = mean[1] + 2 * shift * mean[0] + shift**2
        noise = self._noise / self._rounded if self._rounded else torch.full_like(power, math.nan)
        snr = _decibels(self._signal, self._noise)
        return Figures(self._maximum, kurtosis, top, snr, power, variance.clamp_min(0), noise)

    @property
    def together(self) -> Figures:
        """Figures of all channels together, one value each."""
        wanted = self._count > 0
        shift = (self._shift if self._shift is not None else torch.zeros_like(self._count))[wanted]
        first, second, third, fourth = self._mean_powers[:, wanted]
        weights = self._count[wanted] / self._count[wanted].sum()
        # About the mean of all: moved there channel by channel.
        middle = (weights * (shift + first)).sum()
        by = shift - middle
        variance = (weights * (second + 2 * by * first + by**2)).sum()
        moved = fourth + 4 * by * third + 6 * by**2 * second + 4 * by**3 * first + by**4
        kurtosis = (weights * moved).sum() / variance.square() if float(variance) > 0 else torch.tensor(math.nan)
        radius = self._radius.max()
        top = _top_shares(self._same_radius()[None], radius[None], self._maximum.max()[None])
        snr = _decibels(self._signal.sum()[None], self._noise.sum()[None])
        noise = self._noise.mean() / self._rounded if self._rounded else torch.tensor(math.nan)
        power = (variance + middle**2).reshape(1)
        return Figures(
            self._maximum.max()[None], kurtosis.reshape(1), top, snr, power, variance.reshape(1), noise.reshape(1)
        )

    @property
    def _maximum(self) -> Tensor:
        return torch.where(self._count > 0, torch.maximum(-self.low, self.high), 0.0)

    @property
    def _mean_powers(self) -> Tensor:
        return self._powers / self._count.clamp_min(1)

    def _same_radius(self) -> Tensor:
        """Return the histogram of all channels, ``(BINS,)``: all on the widest channel's bins."""
        total = torch.zeros(BINS, dtype=torch.int64, device=self._count.device)
        widest = float(self._radius.max())
        for radius in set(self._radius.tolist()):
            counts = self._histogram[self._radius == radius].sum(0)
            factor = int(widest / radius) if radius else BINS
            factor = min(factor, BINS)
            total[: BINS // factor] += counts.reshape(-1, factor).sum(1)
        return total


def _top_shares(histogram: Tensor, radius: Tensor, maximum: Tensor) -> Tensor:
    """Return the part of the range that only the largest 0.1 % use; see `Figures`."""
    counts = histogram.cumsum(1)
    below = (1 - TOP) * counts[:, -1:]
    place = (counts < below).sum(1)
    inside = histogram.gather(1, place[:, None]).squeeze(1).clamp_min(1)
    before = counts.gather(1, place[:, None]).squeeze(1) - inside
    # Values of one bin are taken for evenly spread in it.
    quantile = (place + ((below.squeeze(1) - before) / inside).clamp(0, 1)) * radius / histogram.shape[1]
    shares = 1 - quantile / maximum.clamp_min(1e-300)
    return torch.where(maximum > 0, shares.clamp(0, 1), 0.0)


def _decibels(signal: Tensor, noise: Tensor) -> Tensor:
    ratio = 10 * torch.log10(signal / noise)
    return torch.where(signal > 0, ratio, math.nan)
