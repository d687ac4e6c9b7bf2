"""`Target`: the grids, operators and placement that one runtime takes, each rule with its public source."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from repapq_plugin.errors import ConfigError

GENERIC = "generic"
"""Name of the target that stands for any runtime with affine activations: the default."""

CONTAINER_BITS = 8
"""Bits of the integers that carry every grid: those of fewer bits keep their codes inside."""

INTEGERS = ("uint8", "int8", "uint16", "int16")
"""Types of activations and of weights that a target may name; this package writes the first two."""

LAYER_OPERATORS = ("Conv", "ConvTranspose", "Gemm")
"""ONNX operators of the layers that are quantized; a linear layer is a Gemm, whatever it becomes in a file."""

BIASES = ("float", "int32", "either")
"""How a target wants the biases of quantized layers."""

RULES: Mapping[str, str] = {
    "opset": "the operator set is one that the target reads",
    "format": "quantized operators are written as Q/DQ pairs around float operators",
    "activation_type": "activations have the integer type of the target",
    "activation_zero_point": "activations are symmetric, their zero point 0",
    "activation_granularity": "activations have one scale for the whole tensor",
    "weight_type": "weights have the integer type of the target",
    "weight_zero_point": "weights are symmetric, their zero point 0",
    "weight_range": "weights keep to plus and minus 127",
    "weight_axis": "scales of weights lie along the axis of output channels",
    "weight_granularity": "weights have one scale for the whole tensor",
    "power_of_two": "scales are powers of two",
    "scale": "scales are finite and positive",
    "pairs": "Q and DQ of one pair have the same scale and zero point",
    "layer_input": "a layer with integer weights reads integers",
    "layer_weight": "a layer that reads integers has integer weights",
    "bias": "a bias is float, or int32 at the product of the two scales with zero point 0",
    "residual": "of the two inputs of an addition behind a layer, the skipping one is quantized",
    "shared_grid": "inputs of a concatenation share one grid",
    "float_operator": "operators that the target computes in float have no Q/DQ pair of their own",
}
"""What a rule demands, by its key; each key has a check in `repapq_plugin.export.check`."""


FLAGS = (
    *("signed_activations", "symmetric_activations", "weights_per_channel", "power_of_two_scales"),
    *("quantizes_residuals", "rounds_biases"),
)
"""Values of a target that are true or false."""

IMPLIED = "it is not what the target says of itself"
"""Effect of a broken rule that only follows from a target's other values."""


@dataclass(frozen=True)
class Rule:
    """One rule of a target.

    Args:
        key: Which rule, one of `RULES`.
        effect: What the target does to a graph that breaks it.
        source: Where that is published.

    Raises:
        ConfigError: The key is unknown.
    """

    key: str
    effect: str
    source: str

    def __post_init__(self) -> None:
        if self.key not in RULES:
            raise ConfigError(f"rule key={self.key!r} is not allowed; choose one of {', '.join(RULES)}.")

    @property
    def demand(self) -> str:
        """What the rule demands, as half a sentence."""
        return RULES[self.key]


@dataclass(frozen=True)
class Target:
    """What a runtime can compute, and how it wants a quantized network.

    Args:
        name: What it is called.
        signed_activations: Activations are int8 codes from -128 to 127, not uint8 codes from 0 to 255.
        symmetric_activations: Their zero point is 0; only with signed ones.
        weights_per_channel: Weights have a scale for each output channel; otherwise one scale for the whole tensor.
        power_of_two_scales: Every scale is a power of two; only with symmetric activations.
        quantizes_residuals: Of the two inputs of an addition behind a layer, the skipping one is quantized.
        bias: How biases are stored: ``"float"``, ``"int32"`` at the product of both scales, or ``"either"``.
        quantized_operators: ONNX operators that are quantized beside layers with weights.
        shared_grid_operators: ONNX operators whose inputs have to share one grid.
        float_operators: ONNX operators that stay float.
        rounded_outputs: ONNX operators of layers that are computed in integers only if what they give is rounded, at
            once or behind a ReLU.
        rounds_biases: Biases are rounded to multiples of the product of both scales, as the runtime does.
        min_opset: Oldest ONNX operator set of a file for it.
        max_opset: Newest one that it reads.
        opset: The one that is written.
        activation_types: Integer types of activations that it reads in files of others.
        weight_types: Integer types of weights that it reads in files of others.
        file: What to give it.
        notes: What it computes that a float simulation does not, and what else to know, in sentences.
        rules: What `repapq check` tests, besides what the other values imply (`tested`).

    Raises:
        ConfigError: A value is not allowed, or two contradict each other.
    """

    name: str
    signed_activations: bool = False
    symmetric_activations: bool = False
    weights_per_channel: bool = True
    power_of_two_scales: bool = False
    quantizes_residuals: bool = False
    bias: str = "float"
    quantized_operators: tuple[str, ...] = ()
    shared_grid_operators: tuple[str, ...] = ()
    float_operators: tuple[str, ...] = ()
    rounded_outputs: tuple[str, ...] = ()
    rounds_biases: bool = False
    min_opset: int = 13
    max_opset: int = 99
    opset: int = 17
    activation_types: tuple[str, ...] = ("uint8", "int8")
    weight_types: tuple[str, ...] = ("int8",)
    file: str = "QDQ ONNX"
    notes: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        for key in ("quantized_operators", "shared_grid_operators", "float_operators", "rounded_outputs", "notes"):
            self._check_texts(key)
        for key in ("activation_types", "weight_types"):
            self._check_texts(key, INTEGERS)
        if not set(self.rounded_outputs) <= set(LAYER_OPERATORS):
            raise self._refused("rounded_outputs", self.rounded_outputs, f"names out of {', '.join(LAYER_OPERATORS)}")
        rules = tuple(Rule(**rule) if isinstance(rule, Mapping) else rule for rule in self.rules)
        if not all(isinstance(rule, Rule) for rule in rules):
            raise self._refused("rules", self.rules, "a list of Rule")
        object.__setattr__(self, "rules", rules)
        if not isinstance(self.name, str) or not self.name:
            raise self._refused("name", self.name, "a text")
        for key in FLAGS:
            if not isinstance(getattr(self, key), bool):
                raise self._refused(key, getattr(self, key), "True or False")
        if self.bias not in BIASES:
            raise self._refused("bias", self.bias, f"one of {', '.join(map(repr, BIASES))}")
        if self.symmetric_activations and not self.signed_activations:
            raise self._refused("symmetric_activations", True, "signed_activations=True with it")
        if self.power_of_two_scales and not self.symmetric_activations:
            raise self._refused("power_of_two_scales", True, "symmetric_activations=True with it")
        if not 13 <= self.min_opset <= self.opset <= self.max_opset:
            limits = f"a number from min_opset={self.min_opset} to max_opset={self.max_opset}, and none below 13"
            raise self._refused("opset", self.opset, limits)

    def _check_texts(self, key: str, allowed: tuple[str, ...] = ()) -> None:
        values = getattr(self, key)
        if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
            raise self._refused(key, values, "a list of texts")
        if allowed and not (values and set(values) <= set(allowed)):
            raise self._refused(key, values, f"names out of {', '.join(allowed)}")
        object.__setattr__(self, key, tuple(values))

    def _refused(self, key: str, value: object, allowed: str) -> ConfigError:
        return ConfigError(f"target {self.name!r}: {key}={value!r} is not allowed; choose {allowed}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Target:
        """Build a target from plain values.

        Raises:
            ConfigError: A key is unknown or missing, or a value is not allowed.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"target.{key} is not a key of Target; known keys: {', '.join(known)}.")
        if "name" not in values:
            raise ConfigError("target.name is missing; give the target a name.")
        return cls(**values)

    @property
    def tested(self) -> tuple[Rule, ...]:
        """All rules that are tested: those of `rules`, and those that the other values imply."""
        implied = [
            key
            for key, wanted in (
                *(
                    (key, not self.rules)
                    for key in ("opset", "activation_type", "weight_type", "scale", "pairs", "bias")
                ),
                ("activation_zero_point", self.symmetric_activations),
                ("weight_granularity", not self.weights_per_channel),
                ("power_of_two", self.power_of_two_scales),
                ("residual", self.quantizes_residuals),
                ("shared_grid", bool(self.shared_grid_operators)),
                ("float_operator", bool(self.float_operators)),
            )
            if wanted
        ]
        given = {rule.key for rule in self.rules}
        own = (Rule(key, IMPLIED, f"the target {self.name!r}") for key in implied if key not in given)
        return (*self.rules, *own)

    @property
    def folds_exactly(self) -> bool:
        """Whether a weight's grid can take any factor for each channel, as QPR's fold needs it."""
        return self.weights_per_channel and not self.power_of_two_scales

    def remarks(self, bits: Collection[int]) -> list[str]:
        """Return what to say of a network for this target, in sentences; nothing of `GENERIC`.

        Args:
            bits: All numbers of bits that its grids have.
        """
        few = sorted({number for number in bits if number < CONTAINER_BITS})
        if self.name == GENERIC or not few:
            return []
        return [
            f"{self.name} has no integers of {', '.join(map(str, few))} bits: these grids are carried, code by code, "
            f"in {CONTAINER_BITS}-bit ones, which are as large and as fast as any."
        ]

    @property
    def activation_scheme(self) -> str:
        """How activations are quantized, in a few words."""
        kind = "symmetric" if self.symmetric_activations else "affine"
        return f"per tensor {kind} {'signed' if self.signed_activations else 'unsigned'}"

    @property
    def weight_scheme(self) -> str:
        """How weights are quantized, in a few words."""
        return f"per {'channel' if self.weights_per_channel else 'tensor'} symmetric narrow range"

    @property
    def scheme(self) -> str:
        """How scales are restricted, and whose rules these are: an empty text for `generic`."""
        powers = ", scales powers of two" if self.power_of_two_scales else ""
        return "" if self.name == GENERIC else f"{powers}, for {self.name}"
