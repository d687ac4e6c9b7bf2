"""What a user can choose, as frozen dataclasses that refuse bad values when they are made.

The defaults follow the ablation in ``integration/bench`` (our choice where the paper is silent).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from repapq_plugin.errors import ConfigError
from repapq_plugin.targets import TARGETS, Target, find_target
from repapq_plugin.targets.target import GENERIC

T = TypeVar("T")

Schedule = Literal["unit", "stage", "network"]
LossName = Literal["mae", "mse"]
OBSERVER_NAMES = ["min_max", "mse", "mae", "percentile"]
"""Names that ``activation_observer`` takes besides ``auto``; observers add theirs as they are registered."""

WEIGHT_OBSERVER_NAMES = ["min_max", "mse"]
"""Names that ``weight_observer`` takes: those of observers that can give each channel a range."""

MIN_BITS, MAX_BITS = 2, 8

PAPER: Mapping[str, object] = {
    "activation_observer": "mae",
    "weight_observer": "min_max",
    "loss": "mae",
    "schedule": "unit",
    "fold_constants": False,
    "equalize": False,
}
"""What the paper's abstract says, and for weights, of which it says nothing, the plainest range."""


def _reject(key: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"{key}={value!r} is not allowed; choose {allowed}.")


def _check_choices(instance: object) -> None:
    """Compare every ``Literal`` field of a dataclass with what its annotation allows."""
    for key, hint in get_type_hints(type(instance)).items():
        choices = get_args(hint) if getattr(hint, "__origin__", None) is Literal else ()
        value = getattr(instance, key)
        if choices and value not in choices:
            raise _reject(key, value, "one of " + ", ".join(map(repr, choices)))


def _check_name(key: str, value: object, names: Collection[str]) -> None:
    if value not in names:
        raise _reject(key, value, "one of " + ", ".join(map(repr, names)))


def _check_bits(key: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not MIN_BITS <= value <= MAX_BITS:
        raise _reject(key, value, f"a whole number of bits from {MIN_BITS} to {MAX_BITS}")


def _check_number(key: str, value: object, low: float, high: float = float("inf")) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:  # type: ignore[operator]
        limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        raise _reject(key, value, f"a number {limits}")


def _check_count(key: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise _reject(key, value, f"a whole number of at least {low}")


@dataclass(frozen=True)
class LearningRates:
    """Adam's starting learning rates in steps of each layer's own grid, annealed to zero by a cosine.

    Measured in grid steps, one set of values serves 2 to 8 bits and layers of any magnitude: what a
    4-bit grid needs would tear an 8-bit one apart (our choice).

    Args:
        weight: For weights, in steps of the weight grid, and for the bias, in as large a share of
            the layer's output.
        scale: For the logarithm of scales: how many grid steps the end of the range moves.
        affine: For gamma and beta of QPR, in grid steps at the end of the weight's range ("its own,
            larger learning rate").
    """

    weight: float = 0.01
    scale: float = 0.03
    affine: float = 0.03

    def __post_init__(self) -> None:
        for key in ("weight", "scale", "affine"):
            _check_number(f"learning_rates.{key}", getattr(self, key), 0.0, 1.0)


@dataclass(frozen=True)
class RepAPQConfig:
    """How a network is quantized and calibrated.

    Args:
        target: Where the network will run: the name of one of `repapq_plugin.targets.TARGETS`, or a `Target` of one's
            own. It says whether activations are affine or symmetric, signed or not, and whether weights have a scale
            for each output channel.
        weight_bits: Bits of the weights, 2 to 8; symmetric, narrow range, per output channel unless the target says
            otherwise.
        activation_bits: Bits of the activations, 2 to 8; per tensor, affine and unsigned unless the target says
            otherwise.
        first_last_bits: Bits of the layers that read the network's input or write its output;
            ``None`` treats them like the others.
        reduce_range: Use 7 bits of each 8-bit weight: processors without VNNI add pairs of 8-bit products in 16
            bits, which saturates with 8 and never with 7.
        activation_observer: How starting ranges of activations are found: ``min_max``, ``mse``,
            ``mae``, ``percentile``, or ``auto`` (per quantizer, whichever of min-max, MSE and MAE
            disturbs the output of the layers behind it least, by ``loss``).
        weight_observer: How starting ranges of weights are found: ``min_max`` or ``mse``.
        percentile: For ``percentile``: the share of values kept inside, in percent.
        fold_constants: Before anything is quantized, let biases take over what channels contribute that never change
            and are read with outlying weights (`conditioning.constant_channels`).
        equalize: Rescale channels before anything is quantized, so that those of one tensor are of
            like size (`conditioning.equalize`); the float network stays the same function.
        solve: Before anything learns, give each layer the integers that best reproduce what it computed in the float
            network, in closed form (`method.solve`).
        affine: Put QPR's channel-wise affine layer behind each convolution during calibration.
        loss: ``mae`` (paper) or ``mse`` (our choice: ahead with weights of 2 bits; ``integration/bench/ablation.py``).
        stage_weight: Weight of the stage term against the mean unit term; 0 leaves it out.
        schedule: What is optimised together: one ``unit`` after the other, a ``stage`` at once, or
            the whole ``network``.
        steps: Optimisation steps per unit, stage, or network. 0 learns nothing: ranges, and `solve`.
        network_steps: Further steps with the whole network as one stage, once ``schedule`` is done (our choice).
        learning_rates: See `LearningRates`.
        views: In how many forms each image is learned from: as it is, then shifted and mirrored (`method.views`).
        drop_probability: Share of activation values that stay unquantized while learning (QDrop).
        guard_fraction: Share of the calibration batches held out to judge each result; a result
            that is not better there than its starting point is undone.
        keep_float: Glob patterns of module names that stay float.
        layer_bits: Glob pattern of layer names -> ``(weight_bits, activation_bits)``; the last
            match wins, also over ``first_last_bits``.
        units: Glob patterns of further modules to treat as one unit each.
        stages: Glob patterns of the modules to treat as stages; empty finds them.
        cache_bytes: Host memory for cached activations, in bytes; what exceeds it goes to disk.
        seed: Seed of the order in which calibration batches are drawn.

    Raises:
        ConfigError: A value is not allowed; the message names key, value and what is allowed.
    """

    target: str | Target = GENERIC
    weight_bits: int = 8
    activation_bits: int = 8
    first_last_bits: int | None = 8
    reduce_range: bool = False
    activation_observer: str = "auto"
    weight_observer: str = "mse"
    percentile: float = 99.99
    fold_constants: bool = True
    equalize: bool = True
    solve: bool = False
    affine: bool = True
    loss: LossName = "mse"
    stage_weight: float = 1.0
    schedule: Schedule = "stage"
    steps: int = 300
    network_steps: int = 0
    learning_rates: LearningRates = field(default_factory=LearningRates)
    views: int = 1
    drop_probability: float = 0.0
    guard_fraction: float = 0.125
    keep_float: tuple[str, ...] = ()
    layer_bits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    units: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    cache_bytes: int = 4 * 2**30
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choices(self)
        object.__setattr__(self, "target", _target(self.target))
        _check_name("activation_observer", self.activation_observer, [*OBSERVER_NAMES, "auto"])
        _check_name("weight_observer", self.weight_observer, WEIGHT_OBSERVER_NAMES)
        _check_bits("weight_bits", self.weight_bits)
        _check_bits("activation_bits", self.activation_bits)
        if self.first_last_bits is not None:
            _check_bits("first_last_bits", self.first_last_bits)
        _check_number("percentile", self.percentile, 50.0, 100.0)
        _check_number("stage_weight", self.stage_weight, 0.0)
        _check_number("drop_probability", self.drop_probability, 0.0, 1.0)
        _check_number("guard_fraction", self.guard_fraction, 0.0, 0.5)
        _check_count("views", self.views, 1)
        for key in ("steps", "network_steps", "cache_bytes", "seed"):
            _check_count(key, getattr(self, key), 0)
        if isinstance(self.learning_rates, Mapping):
            rates = _build(LearningRates, self.learning_rates, "learning_rates.")
            object.__setattr__(self, "learning_rates", rates)
        if not isinstance(self.learning_rates, LearningRates):
            raise _reject("learning_rates", self.learning_rates, "a LearningRates or a mapping of its keys")
        for key in ("keep_float", "units", "stages"):
            value = getattr(self, key)
            if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
                raise _reject(key, value, "a list of module name patterns")
            object.__setattr__(self, key, tuple(value))
        if not isinstance(self.layer_bits, Mapping):
            raise _reject("layer_bits", self.layer_bits, "a mapping of patterns to (weight_bits, activation_bits)")
        for pattern, bits in self.layer_bits.items():
            if not isinstance(bits, list | tuple) or len(bits) != 2:
                raise _reject(f"layer_bits[{pattern!r}]", bits, "a pair (weight_bits, activation_bits)")
            _check_bits(f"layer_bits[{pattern!r}][0]", bits[0])
            _check_bits(f"layer_bits[{pattern!r}][1]", bits[1])
        frozen_bits = {pattern: (bits[0], bits[1]) for pattern, bits in self.layer_bits.items()}
        object.__setattr__(self, "layer_bits", frozen_bits)

    @classmethod
    def from_preset(cls, preset: str, **overrides: object) -> RepAPQConfig:
        """Return a named configuration, with single keys overridden.

        Args:
            preset: ``"w8a8"``, ``"w6a6"``, ``"w4a4"``, or any other ``"w<bits>a<bits>"``; with ``"paper-"`` in front
                the paper's own settings at those bits (see `paper`).
            **overrides: Any argument of this class.

        Raises:
            ConfigError: The preset or a key is unknown, or a value is not allowed.
        """
        parts = re.fullmatch(r"(paper-)?w(\d{1,3})a(\d{1,3})", str(preset).lower(), re.ASCII)
        if parts is None:
            raise _reject("preset", preset, '"w8a8", "w6a6", "w4a4", another "w<bits>a<bits>", or "paper-w6a6"')
        bits = {"weight_bits": int(parts[2]), "activation_bits": int(parts[3])}
        return cls.from_dict({**bits, **(PAPER if parts[1] else {}), **overrides})

    @classmethod
    def paper(cls, bits: str = "w8a8", **overrides: object) -> RepAPQConfig:
        """Return the paper's own settings (arXiv:2402.16121, abstract), where this package's defaults differ.

        Ranges and loss are MAE, each unit is learned by itself with the stage's output beside it, and nothing happens
        to the channels before. The defaults differ because of what was measured (``integration/bench``): a stage at
        once is ahead of unit by unit at 4 and 3 bits, and MSE is ahead of MAE where weights have 2.

        Args:
            bits: ``"w8a8"``, ``"w6a6"`` or another ``"w<bits>a<bits>"``.
            **overrides: Any argument of this class.

        Raises:
            ConfigError: See `from_preset`.
        """
        return cls.from_preset(f"paper-{bits}", **overrides)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> RepAPQConfig:
        """Build a configuration from plain values, as they come from a config file or a result.

        Raises:
            ConfigError: A key is unknown or a value is not allowed.
        """
        return _build(cls, values, "")

    def to_dict(self) -> dict[str, object]:
        """Return plain values from which `from_dict` builds an equal configuration; the usual target goes unsaid."""
        values = dataclasses.asdict(self)
        return {key: value for key, value in values.items() if (key, value) != ("target", GENERIC)}

    def plain(self) -> RepAPQConfig:
        """Return plain PTQ on the same grids, to compare with: min-max ranges, nothing prepared, nothing learned."""
        return self.replace(
            steps=0,
            solve=False,
            fold_constants=False,
            equalize=False,
            activation_observer="min_max",
            weight_observer="min_max",
        )

    def replace(self, **changes: object) -> RepAPQConfig:
        """Return a copy with some keys changed, checked again."""
        return self.from_dict({**self.to_dict(), **changes})

    def weight_bits_used(self, bits: int) -> int:
        """Return how many of ``bits`` a weight uses: one fewer than 8 under ``reduce_range``."""
        return min(bits, MAX_BITS - 1) if self.reduce_range else bits

    @property
    def runs_on(self) -> Target:
        """Return what ``target`` names."""
        return find_target(self.target) if isinstance(self.target, str) else self.target

    @property
    def scheme(self) -> str:
        """One line that says what is compared when two results are compared."""
        ranges = ", constant channels folded" if self.fold_constants else ""
        ranges += ", channels equalized" if self.equalize else ""
        ranges += ", weights of 8 bits use 7" if self.reduce_range else ""
        ends = "" if self.first_last_bits is None else f", first and last layers {self.first_last_bits} bit"
        target = self.runs_on
        return (
            f"W{self.weight_bits}A{self.activation_bits}: weights {target.weight_scheme} "
            f"({self.weight_observer}), activations {target.activation_scheme} "
            f"({self.activation_observer}){ranges}{ends}{target.scheme}"
        )


def _target(value: object) -> str | Target:
    """Return a target as a configuration keeps it: by name if it comes with the package."""
    if isinstance(value, Mapping):
        value = Target.from_dict(value)
    if isinstance(value, Target):
        return value.name if TARGETS.get(value.name) == value else value
    if not isinstance(value, str):
        raise _reject("target", value, f"the name of a target ({', '.join(TARGETS)}) or a Target")
    return find_target(value).name


def _build(cls: type[T], values: Mapping[str, Any], prefix: str) -> T:
    known = {item.name for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ConfigError(f"{prefix}{key} is not a key of {cls.__name__}; known keys: {', '.join(sorted(known))}.")
    return cls(**values)
