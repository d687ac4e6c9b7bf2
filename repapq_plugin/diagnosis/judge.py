"""From figures to words: which channels stand out, which samples cause it, and what helps."""

from __future__ import annotations

import math
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


def final_noise(moments: Mapping[MomentName, Moment]) -> Noise:
    """Return the same of a calibrated unit: its inputs on the grid that was learned, its weights before they moved.

    Learning moves weights on purpose, so what they differ by afterwards is no noise.
    """
    return noise_of(moments["calibrated"].inputs, moments["conditioned"].weights)


def remedies_for(
    layer: str,
    bits: tuple[int, int],
    moments: Mapping[MomentName, Moment],
    constants_folded: Moment,
    outliers: Sequence[Outlier],
    config: RepAPQConfig,
) -> tuple[Remedy, ...]:
    """Return what helps a unit, in the order to try it.

    Args:
        layer: Module path of its first layer.
        bits: Bits of that layer.
        moments: Figures by moment.
        constants_folded: Figures with constant channels folded, not equalized yet.
        outliers: Its channels that stand out.
        config: Says what is done already.
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
    final = final_noise(moments)
    if final.snr < ENOUGH:
        found.append(_more_bits(layer, bits, final, outliers))
    return tuple(found)


def _more_bits(layer: str, bits: tuple[int, int], final: Noise, outliers: Sequence[Outlier]) -> Remedy:
    sides = (final.weights, final.inputs)
    wanted = [each + _missing(snr) for each, snr in zip(bits, sides, strict=True)]
    said = f"{final.snr:.1f} dB as calibrated (weights {sides[0]:.1f}, inputs {sides[1]:.1f}), {ENOUGH:.0f} wanted"
    rare = sorted({number for outlier in outliers if not outlier.everywhere for number in outlier.samples})
    if rare:
        said += (
            f"; samples {', '.join(map(str, rare[:MOST_SAMPLES]))} hold outliers that no others do, look at them first"
        )
    if max(wanted) > MAX_BITS:
        reason = f"{said}; that takes more than {MAX_BITS} bits"
        return Remedy("keep_float", math.inf, reason, f"keep_float=[{layer!r}]")
    gained = combined([snr + BIT * (now - was) for snr, now, was in zip(sides, wanted, bits, strict=True)]) - final.snr
    reason = f"{said}; each further bit gains {BIT:.0f} dB"
    return Remedy("bits", gained, reason, f"layer_bits={{{layer!r}: ({wanted[0]}, {wanted[1]})}}")


def _missing(snr: float) -> int:
    """Return how many bits one of two factors lacks, so that both together have enough."""
    aim = ENOUGH + 10 * math.log10(2)
    return max(0, math.ceil((aim - snr) / BIT)) if math.isfinite(snr) else 0


def _spread(moment: Moment) -> float:
    maxima = moment.inputs.by_channel.maximum
    alive = maxima[maxima > 0]
    return float(alive.max() / alive.median()) if alive.numel() else 1.0
