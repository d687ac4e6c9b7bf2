"""From figures to words: which channels stand out, which samples cause it, and what helps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repapq_plugin.config import MAX_BITS, RepAPQConfig
from repapq_plugin.diagnosis.table import Moment, MomentName, Outlier, Remedy, TensorFigures, combined

OUTLYING = 4.0
"""A channel stands out if its largest value is this many times that of the typical channel (our choice, as for constant
channels)."""

MOST_OUTLIERS, MOST_SAMPLES = 5, 5
"""Of a unit, and of a channel."""

GAIN = 1.0
"""Decibels that a remedy gains at least to be named (our choice: a sixth of a bit)."""

ENOUGH = 20.0
"""Decibels from which on a unit needs nothing: an error of a hundredth in power, a tenth in size (our choice)."""

BIT = 20 * math.log10(2)
"""Decibels that one more bit gains: half the step."""


def wanted_snr(snrs: Sequence[float]) -> float:
    """Return what a unit should reach, in decibels: what the typical unit of its network does, and `ENOUGH` at most.

    With few bits no unit reaches much. What counts then is which ones are behind the others.
    """
    known = [snr for snr in snrs if math.isfinite(snr)]
    return min(ENOUGH, statistics.median(known)) if known else ENOUGH


def outliers_of(peaks: Tensor) -> tuple[Outlier, ...]:
    """Return the channels that stand out, the largest first.

    Args:
        peaks: Largest absolute value of each channel in each sample, ``(channels, samples)``.
    """
    if not peaks.numel():
        return ()
    largest = peaks.amax(1).double()
    alive = largest[largest > 0]
    if not alive.numel():
        return ()
    times = largest / alive.median()
    found = []
    for channel in torch.argsort(times, descending=True)[:MOST_OUTLIERS].tolist():
        if float(times[channel]) < OUTLYING:
            break
        by_sample = peaks[channel].double()
        reached = by_sample > largest[channel] / 2
        order = torch.argsort(by_sample, descending=True, stable=True)[: min(MOST_SAMPLES, int(reached.sum()))]
        found.append(
            Outlier(
                channel,
                float(largest[channel]),
                float(times[channel]),
                tuple(order.tolist()),
                tuple(by_sample[order].tolist()),
                float(reached.double().mean()),
            )
        )
    return tuple(found)


@dataclass(frozen=True)
class Noise:
    """Where the noise of a unit's products comes from, in decibels of signal over noise.

    Args:
        weights: If only weights were rounded.
        inputs: If only inputs were rounded.
    """

    weights: float
    inputs: float

    @property
    def snr(self) -> float:
        """With both rounded."""
        return combined((self.weights, self.inputs))


def noise_of(inputs: TensorFigures, weights: TensorFigures | None) -> Noise:
    """Return the noise of products of inputs and weights, channel by channel.

    The signal is what varies: for each channel the power of its weights times the variance of its input; what never
    changes is no signal, however large. The noise is the power of one factor times the noise of the other. Channels
    are taken to be independent (our choice: sums over channels, as a convolution makes them, with no term between two).
    """
    x = inputs.by_channel
    if weights is None:
        return Noise(math.nan, float(inputs.together.snr[0]))
    w = weights.by_channel
    signal = float((w.power * x.variance).sum())
    of_weights, of_inputs = (w.noise * x.power).sum(), (w.power * x.noise).sum()
    return Noise(_decibels(signal, float(of_weights)), _decibels(signal, float(of_inputs)))


def _decibels(signal: float, noise: float) -> float:
    if not signal > 0 or math.isnan(noise):
        return math.nan
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf


def final_noise(start: Moment, calibrated: Moment) -> Noise:
    """Return the noise of a calibrated unit against the float network's signal.

    Its inputs are on the grid that was chosen, its weights as they were before they moved: learning moves weights on
    purpose, so that what they differ by afterwards is no noise.

    Args:
        start: The float network that calibration set out from.
        calibrated: What came out.
    """
    x, w = start.inputs.by_channel, start.weights
    noise = calibrated.inputs.by_channel.noise
    if w is None:
        return Noise(math.nan, float(calibrated.inputs.together.snr[0]))
    signal = float((w.by_channel.power * x.variance).sum())
    of_weights = float((w.by_channel.noise * x.power).sum())
    return Noise(_decibels(signal, of_weights), _decibels(signal, float((w.by_channel.power * noise).sum())))


def channel_remedies(
    moments: Mapping[MomentName, Moment], constants_folded: Moment, config: RepAPQConfig
) -> tuple[Remedy, ...]:
    """Return what helps a unit by what it does to channels, in the order to try it.

    Args:
        moments: Figures by moment.
        constants_folded: Figures with constant channels folded, not equalized yet.
        config: Says what is set already.
    """
    found: list[Remedy] = []
    told = (moments["merged"], constants_folded, moments["conditioned"])
    merged, folded, equal = (noise_of(moment.inputs, moment.weights).snr for moment in told)
    if folded - merged >= GAIN:
        applied = config.fold_constants
        reason = f"constant channels are read with outlying weights: {merged:.1f} dB with them, {folded:.1f} dB folded"
        found.append(Remedy("fold_constants", folded - merged, reason, "" if applied else "fold_constants=True"))
    if equal - folded >= GAIN:
        applied = config.equalize
        spread = _spread(moments["merged"]), _spread(moments["conditioned"])
        reason = (
            f"channels differ in size: the largest is {spread[0]:.3g} times the typical one, {spread[1]:.3g} times "
            f"once equalized; {folded:.1f} dB before, {equal:.1f} dB then"
        )
        found.append(Remedy("equalize", equal - folded, reason, "" if applied else "equalize=True"))
    return tuple(found)


def bit_remedy(
    layer: str,
    bits: tuple[int, int],
    final: Noise,
    wanted: float,
    outliers: Sequence[Outlier],
    when: str = "as calibrated",
) -> tuple[Remedy, ...]:
    """Return how many more bits a unit needs, or that it should stay float; nothing where it has enough.

    Args:
        layer: Module path of its first layer.
        bits: Bits of that layer.
        final: Its noise as calibrated.
        wanted: What it should reach; see `wanted_snr`. It may be less by one bit.
        outliers: Its channels that stand out.
        when: In which state it has that noise.
    """
    if not (final.snr < ENOUGH and final.snr <= wanted - BIT):
        return ()
    sides = (final.weights, final.inputs)
    needed = [each + _missing(snr, wanted) for each, snr in zip(bits, sides, strict=True)]
    said = f"{final.snr:.1f} dB {when} (weights {sides[0]:.1f}, inputs {sides[1]:.1f}), {wanted:.1f} wanted"
    rare = sorted({number for outlier in outliers if not outlier.everywhere for number in outlier.samples})
    if rare:
        numbers = ", ".join(map(str, rare[:MOST_SAMPLES]))
        said += f"; samples {numbers} hold outliers that others do not, look at them first"
    if max(needed) > MAX_BITS:
        reason = f"{said}; that takes more than {MAX_BITS} bits"
        return (Remedy("keep_float", math.inf, reason, f"keep_float=[{layer!r}]"),)
    gained = combined([snr + BIT * (now - was) for snr, now, was in zip(sides, needed, bits, strict=True)]) - final.snr
    reason = f"{said}; each further bit gains {BIT:.0f} dB"
    return (Remedy("bits", gained, reason, f"layer_bits={{{layer!r}: ({needed[0]}, {needed[1]})}}"),)


def _missing(snr: float, wanted: float) -> int:
    """Return how many bits one of two factors lacks, so that both together reach what is wanted."""
    aim = wanted + 10 * math.log10(2)
    return max(0, math.ceil((aim - snr) / BIT)) if math.isfinite(snr) else 0


def _spread(moment: Moment) -> float:
    maxima = moment.inputs.by_channel.maximum
    alive = maxima[maxima > 0]
    return float(alive.max() / alive.median()) if alive.numel() else 1.0
