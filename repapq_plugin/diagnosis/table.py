"""What a diagnosis found of each unit: figures at four moments, outliers with their samples, and remedies."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from repapq_plugin.core.files import write_atomically
from repapq_plugin.diagnosis.statistics import Figures
from repapq_plugin.result import CalibrationResult

FORMAT, VERSION = "repapq-diagnosis", 1

MomentName = Literal["branched", "merged", "conditioned", "calibrated"]
MOMENTS: Mapping[MomentName, str] = {
    "branched": "before the merge",
    "merged": "after the merge",
    "conditioned": "channels equalized, constants folded",
    "calibrated": "after calibration",
}
"""When a unit is looked at, and how people call it."""

RemedyName = Literal["fold_constants", "equalize", "bits", "keep_float"]


@dataclass(frozen=True)
class TensorFigures:
    """Figures of a tensor, all channels together and each by itself; channels are those that a layer reads."""

    together: Figures
    by_channel: Figures


@dataclass(frozen=True)
class Moment:
    """One unit at one moment.

    Args:
        inputs: What its first layer reads.
        weights: The weights that read each of these channels; ``None`` where they cannot be told: of branches whose
            composition nobody taught.
    """

    inputs: TensorFigures
    weights: TensorFigures | None


@dataclass(frozen=True)
class Outlier:
    """A channel that stands out.

    Args:
        channel: Its number.
        peak: Largest absolute value.
        times: How many times as large as that of the typical channel.
        samples: Numbers of the samples that cause it, the largest first.
        peaks: Its largest absolute value in each of them.
        share: In which part of all samples it reaches more than half its peak.
    """

    channel: int
    peak: float
    times: float
    samples: tuple[int, ...]
    peaks: tuple[float, ...]
    share: float

    @property
    def everywhere(self) -> bool:
        """Whether it is the channel that stands out, in most samples, and not a few samples in it."""
        return self.share > 0.5


@dataclass(frozen=True)
class Remedy:
    """What helps a unit.

    Args:
        name: Which remedy.
        gain: Decibels that it gains, measured or expected; infinite where no noise is left.
        reason: Why, in figures.
        how: What to write into a configuration; empty where the configuration does it already.
    """

    name: RemedyName
    gain: float
    reason: str
    how: str


@dataclass(frozen=True)
class UnitDiagnosis:
    """All that was found of one unit.

    Args:
        name: Module path.
        layer: Module path of its first layer, whose input is told of.
        bits: ``(weight_bits, activation_bits)`` of that layer.
        moments: Figures by moment.
        outliers: The most outstanding channels after the merge, the largest first.
        remedies: Those that apply, in the order to try them.
        snr: Signal over noise of the unit's products, in decibels, as it is calibrated (see `judge.final_noise`).
        peaks: Largest absolute value of each channel in each sample after the merge, ``(channels, samples)``.
    """

    name: str
    layer: str
    bits: tuple[int, int]
    moments: Mapping[MomentName, Moment]
    outliers: tuple[Outlier, ...]
    remedies: tuple[Remedy, ...]
    snr: float
    peaks: Tensor = field(repr=False, compare=False)


@dataclass(frozen=True)
class Diagnosis:
    """Why a network loses by quantization.

    Args:
        result: The calibrated network.
        units: In call order.
        samples: How many samples were looked at.
    """

    result: CalibrationResult
    units: tuple[UnitDiagnosis, ...]
    samples: int

    @property
    def weakest(self) -> list[UnitDiagnosis]:
        """The units, those of the least signal over noise first."""
        return sorted(self.units, key=lambda unit: (math.isnan(unit.snr), unit.snr))

    def save(self, path: str | Path) -> Path:
        """Write all figures as JSON; what is not finite becomes ``null``.

        Raises:
            ExportError: The file cannot be written.
        """
        said = {
            "format": FORMAT,
            "version": VERSION,
            "scheme": self.result.config.scheme,
            "samples": self.samples,
            "units": [_unit(unit) for unit in self.units],
            "notes": list(self.result.notes),
        }
        write_atomically(Path(path), (json.dumps(said, indent=1, allow_nan=False) + "\n").encode())
        return Path(path)


def combined(snrs: Sequence[float]) -> float:
    """Return the signal-to-noise ratio that several sources of noise leave together, in decibels.

    Their squares add where they do not depend on each other (our choice).
    """
    known = [snr for snr in snrs if not math.isnan(snr)]
    noise = math.fsum(10 ** (-snr / 10) for snr in known)
    return math.nan if not known else math.inf if noise == 0 else -10 * math.log10(noise)


def _unit(unit: UnitDiagnosis) -> dict[str, object]:
    return {
        "name": unit.name,
        "layer": unit.layer,
        "bits": list(unit.bits),
        "snr": _number(unit.snr),
        "moments": {
            name: {"inputs": _tensor(moment.inputs), "weights": moment.weights and _tensor(moment.weights)}
            for name, moment in unit.moments.items()
        },
        "outliers": [vars(outlier) for outlier in unit.outliers],
        "remedies": [{**vars(remedy), "gain": _number(remedy.gain)} for remedy in unit.remedies],
    }


def _tensor(figures: TensorFigures) -> dict[str, object]:
    together = {key: _number(float(getattr(figures.together, key)[0])) for key in TOLD}
    by_channel = {key: list(map(_number, getattr(figures.by_channel, key).tolist())) for key in TOLD}
    return {**together, "by_channel": by_channel}


TOLD = ("maximum", "kurtosis", "top_share", "snr")
"""Figures that are written; the others are for judging."""


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def figures_of(values: Figures) -> Figures:
    """Return figures on the CPU."""
    return Figures(**{key: torch.as_tensor(value).cpu() for key, value in vars(values).items()})
