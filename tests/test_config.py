"""Configurations refuse what is not allowed when they are made, by name, and survive being written down."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repapq_plugin.config import LearningRates, RepAPQConfig
from repapq_plugin.errors import ConfigError, RepAPQError
from repapq_plugin.targets import TARGETS, Target

NAN, INFINITY = float("nan"), float("inf")

bit_widths = st.integers(2, 8)
shares = st.floats(0, 1)
patterns = st.lists(st.text(min_size=1, max_size=8), max_size=3)
own_target = Target("own", signed_activations=True, symmetric_activations=True, weights_per_channel=False)
allowed: dict[str, st.SearchStrategy[object]] = {
    "target": st.sampled_from([*TARGETS, own_target]),
    "weight_bits": bit_widths,
    "activation_bits": bit_widths,
    "first_last_bits": st.none() | bit_widths,
    "activation_observer": st.sampled_from(["min_max", "mse", "mae", "percentile", "auto"]),
    "weight_observer": st.sampled_from(["min_max", "mse"]),
    "percentile": st.floats(50, 100),
    "fold_constants": st.booleans(),
    "reduce_range": st.booleans(),
    "equalize": st.booleans(),
    "solve": st.booleans(),
    "affine": st.booleans(),
    "loss": st.sampled_from(["mae", "mse"]),
    "stage_weight": st.floats(0, 1e6),
    "schedule": st.sampled_from(["unit", "stage", "network"]),
    "steps": st.integers(0, 10**6),
    "network_steps": st.integers(0, 10**6),
    "learning_rates": st.fixed_dictionaries({}, optional={"weight": shares, "scale": shares, "affine": shares}),
    "drop_probability": shares,
    "views": st.integers(1, 100),
    "guard_fraction": st.floats(0, 0.5),
    "keep_float": patterns,
    "layer_bits": st.dictionaries(st.text(max_size=8), st.tuples(bit_widths, bit_widths), max_size=3),
    "units": patterns,
    "stages": patterns,
    "cache_bytes": st.integers(0, 2**40),
    "seed": st.integers(0, 2**31),
}


def test_every_key_is_covered_here() -> None:
    assert set(allowed) == {field.name for field in dataclasses.fields(RepAPQConfig)}


@given(st.fixed_dictionaries({}, optional=allowed))
def test_what_is_allowed_survives_dict_json_copy_and_pickle(values: dict[str, object]) -> None:
    config = RepAPQConfig.from_dict(values)
    assert RepAPQConfig.from_dict(config.to_dict()) == config
    assert RepAPQConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    for key, value in values.items():
        if key not in ("learning_rates", "keep_float", "units", "stages"):
            assert getattr(config, key) == value
    assert isinstance(config.learning_rates, LearningRates)
    for key, value in values.get("learning_rates", {}).items():
        assert getattr(config.learning_rates, key) == value


bad_values: list[tuple[str, object, str]] = [
    *((key, value, "2 to 8") for key in ("weight_bits", "activation_bits") for value in (1, 9, 4.0, "8", None, True)),
    *(("first_last_bits", value, "2 to 8") for value in (0, 16, False, "8")),
    *(("activation_observer", value, "'min_max', 'mse', 'mae', 'percentile', 'auto'") for value in ("max", None, 1)),
    *(("weight_observer", value, "'min_max', 'mse'") for value in ("mae", "auto", [])),
    *(("percentile", value, "50 to 100") for value in (49.9, 101, NAN, "99", None)),
    *(("loss", value, "'mae', 'mse'") for value in ("l1", None)),
    *(("schedule", value, "'unit', 'stage', 'network'") for value in ("block", "", None)),
    *(("stage_weight", value, "at least 0") for value in (-1, NAN, INFINITY, "1", True)),
    *(("drop_probability", value, "0 to 1") for value in (-0.1, 1.1, NAN, None)),
    *(("guard_fraction", value, "0 to 0.5") for value in (-0.1, 0.6, "half")),
    *(("steps", value, "at least 0") for value in (-1, 1.5, "300", None, True)),
    *(("network_steps", value, "at least 0") for value in (-1, 0.5, "10", None, False)),
    *(("views", value, "at least 1") for value in (0, -1, 1.5, "2", True)),
    *(("cache_bytes", value, "at least 0") for value in (-1, 1e9, None)),
    *(("seed", value, "at least 0") for value in (-1, 0.5, None)),
    *(("learning_rates", value, "LearningRates") for value in (0.1, None, [])),
    *((key, value, "a list") for key in ("keep_float", "units", "stages") for value in ("head", [1], None, 3)),
    *(("layer_bits", value, "a mapping") for value in ([("head", (8, 8))], None, "head", 8)),
]


@pytest.mark.parametrize(("key", "value", "remedy"), bad_values, ids=repr)
def test_what_is_not_allowed_is_named_with_its_value_and_the_remedy(key: str, value: object, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RepAPQConfig(**{key: value})
    assert str(caught.value).startswith(f"{key}={value!r} is not allowed; choose ")
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("bits", "place"),
    [((9, 8), "[0]=9"), ((8, 1), "[1]=1"), ((8,), "=(8,)"), (8, "=8"), (None, "=None"), ("44", "='44'")],
)
def test_bits_of_a_layer_are_named_with_their_pattern(bits: object, place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RepAPQConfig(layer_bits={"neck.*": (4, 4), "head.*": bits})
    assert f"layer_bits['head.*']{place}" in str(caught.value)


@pytest.mark.parametrize("key", ["weight", "scale", "affine"])
@pytest.mark.parametrize("value", [-1e-3, 1.5, NAN, INFINITY, "fast", None, True])
def test_a_learning_rate_is_named_with_its_group(key: str, value: object) -> None:
    for build in (LearningRates, lambda **rates: RepAPQConfig(learning_rates=rates)):
        with pytest.raises(ConfigError, match=f"learning_rates.{key}=.*from 0 to 1"):
            build(**{key: value})


def test_an_unknown_key_is_named_beside_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="weight_bit is not a key of RepAPQConfig; known keys: .*weight_bits"):
        RepAPQConfig.from_dict({"weight_bit": 4})
    with pytest.raises(ConfigError, match="learning_rates.gamma is not a key of LearningRates; known keys: affine"):
        RepAPQConfig(learning_rates={"gamma": 0.1})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="step is not a key"):
        RepAPQConfig.from_preset("w4a4", step=3)
    with pytest.raises(ConfigError, match="step is not a key"):
        RepAPQConfig().replace(step=3)


@pytest.mark.parametrize(("preset", "bits"), [("w8a8", (8, 8)), ("w6a6", (6, 6)), ("W4A4", (4, 4)), ("w2a5", (2, 5))])
def test_presets(preset: str, bits: tuple[int, int]) -> None:
    config = RepAPQConfig.from_preset(preset, steps=7, learning_rates={"affine": 0.5})
    assert (config.weight_bits, config.activation_bits) == bits
    assert (config.steps, config.learning_rates.affine) == (7, 0.5)
    assert config.replace(steps=RepAPQConfig().steps, learning_rates={}) == RepAPQConfig(
        weight_bits=bits[0], activation_bits=bits[1]
    )
    assert config.scheme.startswith(preset.upper())


def test_an_override_wins_over_its_preset() -> None:
    assert RepAPQConfig.from_preset("w8a8", weight_bits=5).weight_bits == 5


@pytest.mark.parametrize("preset", ["int8", "", "w8", "a8", "8a8", "w8a8x", "w-4a4", "w²a4", "w4 a4", "waa", None, 8])
def test_an_unknown_preset_is_refused(preset: object) -> None:
    with pytest.raises(ConfigError, match="preset=.*w8a8"):
        RepAPQConfig.from_preset(preset)


@pytest.mark.parametrize(("preset", "key"), [("w9a8", "weight_bits=9"), ("w8a1", "activation_bits=1")])
def test_a_preset_of_forbidden_bits_names_the_key(preset: str, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        RepAPQConfig.from_preset(preset)


def test_configurations_are_frozen_and_do_not_share() -> None:
    keep, bits = ["head"], {"neck": [4, 4]}
    config = RepAPQConfig(keep_float=keep, layer_bits=bits)  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.learning_rates.weight = 3  # type: ignore[misc]
    keep.append("neck")
    bits["head"] = [2, 2]
    config.to_dict()["layer_bits"]["tail"] = (3, 3)
    assert (config.keep_float, config.layer_bits) == (("head",), {"neck": (4, 4)})


def test_replacing_checks_again_and_leaves_the_original() -> None:
    config = RepAPQConfig()
    assert config.replace(loss="mse").loss == "mse"
    assert config == RepAPQConfig()
    with pytest.raises(ConfigError, match="loss='huber'"):
        config.replace(loss="huber")


def test_the_scheme_says_what_a_table_compares() -> None:
    config = RepAPQConfig(weight_bits=4, activation_bits=6, weight_observer="mse", activation_observer="mae")
    for part in ("W4A6", "weights per channel symmetric narrow range (mse)", "(mae)", "first and last layers 8 bit"):
        assert part in config.scheme
    assert "first and last" not in config.replace(first_last_bits=None).scheme


def test_one_exception_class_catches_everything() -> None:
    with pytest.raises(RepAPQError):
        RepAPQConfig(steps=-1)
    with pytest.raises(ValueError, match="steps=-1"):
        RepAPQConfig(steps=-1)
