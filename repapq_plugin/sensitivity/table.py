"""What was measured of each unit at each bit width, and what an assignment of bits comes to."""

from __future__ import annotations

import dataclasses
import difflib
import glob
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from repapq_plugin.core.files import write_atomically
from repapq_plugin.errors import ConfigError, ResultError
from repapq_plugin.sensitivity.widths import Bits, shown

FORMAT, VERSION = "repapq-sensitivity", 1


@dataclass(frozen=True)
class Option:
    """One unit at one bit width, all else float.

    Args:
        bits: The width.
        layers: Bits of each of its layers by module path; what the configuration pins differs from ``bits``.
        noise: Squared error of the network's outputs divided by their squared size, mean over samples and outputs, of
            which each weighs as much as it has values.
        mae: Absolute error likewise, divided by the absolute size.
        weight_bits: Bits of all its weights together.
        bit_operations: Products of one sample, each counted as bits of the weight times bits of the activation.
        scores: The task's metrics, where they were evaluated.
    """

    bits: Bits
    layers: Mapping[str, Bits]
    noise: float
    mae: float
    weight_bits: int
    bit_operations: int
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def snr(self) -> float:
        """Signal-to-noise ratio at the network's output, in decibels; infinite without any error."""
        return -10 * math.log10(self.noise) if self.noise > 0 else math.inf


@dataclass(frozen=True)
class UnitSensitivity:
    """One unit at every width that it can get.

    Args:
        name: Module path.
        weights: How many weights its layers hold.
        options: Those of the fewest bits first; only one where the configuration pins all its layers.
    """

    name: str
    weights: int
    options: tuple[Option, ...]

    @property
    def pinned(self) -> bool:
        """Whether the configuration leaves no choice."""
        return len(self.options) == 1

    def at(self, bits: Bits) -> Option:
        """Return what was measured at a width; the only thing there is of a pinned unit.

        Raises:
            ConfigError: The width was not measured.
        """
        for option in self.options:
            if option.bits == tuple(bits) or self.pinned:
                return option
        measured = ", ".join(shown(option.bits) for option in self.options)
        raise ConfigError(f"Unit {self.name!r} was not measured at bits={tuple(bits)!r}; choose one of {measured}.")


@dataclass(frozen=True)
class Assignment:
    """Bits for every unit, and what they come to.

    Args:
        bits: Width of each unit, by its name.
        layer_bits: What `RepAPQConfig` takes under this name: every quantized layer, by a pattern that its path alone
            matches.
        noise: Sum of the units' noise: what the output's noise would be if errors of units did not depend on each
            other, so that their squares add.
        mean_bits: Bits of a weight, mean over all quantized weights.
        size_bytes: Packed weights without gaps, and all other parameters and buffers as they are.
        bit_operations: See `Option`.
    """

    bits: Mapping[str, Bits]
    layer_bits: Mapping[str, Bits]
    noise: float
    mean_bits: float
    size_bytes: int
    bit_operations: int


@dataclass(frozen=True)
class Sensitivity:
    """What each unit of a network costs at each bit width.

    Args:
        units: In call order.
        other_bytes: Bytes of all parameters and buffers that are no quantized weight.
        scheme: Ranges and grids that were measured with.
        scores: The task's metrics of the float network, where they were evaluated.
        notes: What is worth knowing.
    """

    units: tuple[UnitSensitivity, ...]
    other_bytes: int
    scheme: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """How many quantized weights there are."""
        return sum(unit.weights for unit in self.units)

    def unit(self, name: str) -> UnitSensitivity:
        """Return a unit by its name.

        Raises:
            ConfigError: There is none; near names are told.
        """
        names = [unit.name for unit in self.units]
        if name not in names:
            near = difflib.get_close_matches(name, names, 3, 0.0)
            raise ConfigError(f"The network has no unit {name!r}; units with names like it: {', '.join(near)}.")
        return self.units[names.index(name)]

    def ranking(self) -> list[tuple[UnitSensitivity, Option]]:
        """Return every unit at every width, the most damaging first."""
        pairs = [(unit, option) for unit in self.units for option in unit.options]
        return sorted(pairs, key=lambda pair: -pair[1].noise)

    def uniform(self, bits: Bits) -> Assignment:
        """Return what one width for all units comes to; pinned units keep theirs.

        Raises:
            ConfigError: It was not measured.
        """
        return self.assignment({unit.name: bits for unit in self.units})

    def assignment(self, bits: Mapping[str, Bits]) -> Assignment:
        """Return what widths of units come to.

        Args:
            bits: A measured width for each unit; pinned units need none.

        Raises:
            ConfigError: A unit is unknown or missing, or a width was not measured.
        """
        for name in bits:
            self.unit(name)
        chosen: dict[str, Option] = {}
        for unit in self.units:
            if unit.name not in bits and not unit.pinned:
                raise ConfigError(f"bits say nothing of unit {unit.name!r}; give it a width.")
            chosen[unit.name] = unit.at(bits.get(unit.name, unit.options[0].bits))
        weight_bits = sum(option.weight_bits for option in chosen.values())
        return Assignment(
            bits={name: option.bits for name, option in chosen.items()},
            layer_bits={
                glob.escape(layer): pair for option in chosen.values() for layer, pair in option.layers.items()
            },
            noise=math.fsum(option.noise for option in chosen.values()),
            mean_bits=weight_bits / self.weights,
            size_bytes=self.other_bytes + -(-weight_bits // 8),
            bit_operations=sum(option.bit_operations for option in chosen.values()),
        )

    def save(self, path: str | Path) -> Path:
        """Write all of it as JSON.

        Raises:
            ExportError: The file cannot be written.
        """
        said = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        write_atomically(Path(path), (json.dumps(said, indent=1) + "\n").encode())
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read what `save` wrote.

        Raises:
            ResultError: The file is missing or is something else.
        """
        try:
            said = json.loads(Path(path).read_bytes())
            if (said.pop("format"), said.pop("version")) != (FORMAT, VERSION):
                raise ValueError("another format or version")
            units = tuple(
                UnitSensitivity(unit["name"], unit["weights"], tuple(map(_option, unit["options"])))
                for unit in said.pop("units")
            )
            return cls(**{**said, "units": units, "notes": tuple(said["notes"])})
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ResultError(f"{path} is not a saved sensitivity ({error}); measure it again.") from error


def _option(said: Mapping[str, object]) -> Option:
    numbers, layers = cast("Mapping[str, float]", said), cast("Mapping[str, Sequence[int]]", said["layers"])
    return Option(
        bits=_pair(cast("Sequence[int]", said["bits"])),
        layers={name: _pair(bits) for name, bits in layers.items()},
        noise=numbers["noise"],
        mae=numbers["mae"],
        weight_bits=int(numbers["weight_bits"]),
        bit_operations=int(numbers["bit_operations"]),
        scores=dict(cast("Mapping[str, float]", said["scores"])),
    )


def _pair(bits: Sequence[int]) -> Bits:
    weight, activation = bits
    return weight, activation
