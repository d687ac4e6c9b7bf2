"""One policy: the last pattern wins, ends have bits of their own, and what is named must exist."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from repapq_plugin.config import OBSERVER_NAMES, WEIGHT_OBSERVER_NAMES, RepAPQConfig
from repapq_plugin.errors import ConfigError
from repapq_plugin.observers import OBSERVERS
from repapq_plugin.policy import (
    AUTO_ALONE,
    AUTO_CANDIDATES,
    KEPT_FLOAT,
    NO_CHANNEL_AXIS,
    activation_observers,
    bits_of,
    check_names,
    check_patterns,
    is_kept_float,
    lone_activation_observer,
    observer_arguments,
    reason_for_float,
)

bit_widths = st.integers(2, 8)
pairs = st.tuples(bit_widths, bit_widths)
names = st.lists(st.sampled_from(["stem", "stages", "0", "1", "conv", "head"]), min_size=1, max_size=4).map(".".join)
patterns = st.lists(st.sampled_from(["stem", "stages", "?", "*", "[01]", "conv", "head"]), min_size=1, max_size=4).map(
    ".".join
)
configs = st.builds(
    RepAPQConfig,
    weight_bits=bit_widths,
    activation_bits=bit_widths,
    first_last_bits=st.none() | bit_widths,
    layer_bits=st.dictionaries(patterns, pairs, max_size=4),
)


@given(name=names, at_an_end=st.booleans(), config=configs)
def test_the_last_pattern_that_matches_wins(name: str, at_an_end: bool, config: RepAPQConfig) -> None:
    matching = [bits for pattern, bits in config.layer_bits.items() if fnmatchcase(name, pattern)]
    ends = (config.first_last_bits, config.first_last_bits)
    if matching:
        assert bits_of(name, at_an_end, config) == matching[-1]
    elif at_an_end and config.first_last_bits is not None:
        assert bits_of(name, at_an_end, config) == ends
    else:
        assert bits_of(name, at_an_end, config) == (config.weight_bits, config.activation_bits)


@given(name=names, at_an_end=st.booleans(), config=configs, bits=pairs)
def test_one_more_pattern_decides_if_it_matches_and_else_changes_nothing(
    name: str, at_an_end: bool, config: RepAPQConfig, bits: tuple[int, int]
) -> None:
    others = {pattern: value for pattern, value in config.layer_bits.items() if pattern not in (name, "elsewhere.*")}
    config = config.replace(layer_bits=others)
    matching = config.replace(layer_bits={**others, name: bits})
    assert bits_of(name, at_an_end, matching) == bits
    strange = config.replace(layer_bits={**others, "elsewhere.*": bits})
    assert bits_of(name, at_an_end, strange) == bits_of(name, at_an_end, config)


@given(name=names, at_an_end=st.booleans(), config=configs)
def test_a_reduced_range_takes_one_bit_from_weights_of_eight_and_nothing_else(
    name: str, at_an_end: bool, config: RepAPQConfig
) -> None:
    weight, activation = bits_of(name, at_an_end, config)
    assert bits_of(name, at_an_end, config.replace(reduce_range=True)) == (7 if weight == 8 else weight, activation)


@given(name=names, config=configs)
def test_without_bits_for_ends_they_are_layers_like_others(name: str, config: RepAPQConfig) -> None:
    config = config.replace(first_last_bits=None)
    assert bits_of(name, True, config) == bits_of(name, False, config)


@given(outer=names, inner=names)
def test_what_is_kept_float_keeps_all_inside_float(outer: str, inner: str) -> None:
    config = RepAPQConfig(keep_float=(outer,))
    assert is_kept_float(outer, config) and is_kept_float(f"{outer}.{inner}", config)
    assert reason_for_float(f"{outer}.{inner}", nn.Conv2d(1, 1, 1), config) == KEPT_FLOAT
    assert not is_kept_float(f"{outer}x", config)
    assert not is_kept_float(f"other.{outer}", config)
    assert not is_kept_float(outer, RepAPQConfig())


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.ConvTranspose2d(4, 4, 2, groups=2), NO_CHANNEL_AXIS),
        (nn.ConvTranspose2d(4, 4, 2), ""),
        (nn.Conv2d(4, 4, 2, groups=2), ""),
        (nn.Linear(4, 4), ""),
    ],
)
def test_only_a_grouped_transposed_convolution_stays_float_by_itself(layer: nn.Module, reason: str) -> None:
    assert reason_for_float("up", layer, RepAPQConfig()) == reason


@given(found=st.lists(names, max_size=5), pattern=patterns, key=st.sampled_from(["keep_float", "layer_bits"]))
def test_a_pattern_that_matches_nothing_is_an_error_with_key_and_pattern(
    found: list[str], pattern: str, key: str
) -> None:
    if any(fnmatchcase(name, pattern) for name in found):
        check_patterns([pattern], found, key)
        return
    with pytest.raises(ConfigError) as raised:
        check_patterns([pattern], found, key)
    assert str(raised.value) == f"{key}: the pattern {pattern!r} matches no module of the merged model."


MODULES = ("", "stem", "stem.conv", "fc")
LAYERS = ("stem.conv", "fc")


@pytest.mark.parametrize("key", ["keep_float", "units", "stages"])
def test_every_list_of_modules_is_checked_against_modules(key: str) -> None:
    check_names(RepAPQConfig(**{key: ("st*", "fc")}), MODULES, LAYERS)
    with pytest.raises(ConfigError, match=rf"^{key}: the pattern 'neck' matches"):
        check_names(RepAPQConfig(**{key: ("stem", "neck")}), MODULES, LAYERS)


def test_bits_are_given_to_layers() -> None:
    check_names(RepAPQConfig(layer_bits={"stem.*": (4, 4)}), MODULES, LAYERS)
    with pytest.raises(ConfigError, match=r"^layer_bits: the pattern 'stem' matches"):
        check_names(RepAPQConfig(layer_bits={"stem": (4, 4)}), MODULES, LAYERS)


@pytest.mark.parametrize("name", [*OBSERVER_NAMES, "auto"])
def test_every_name_of_an_activation_observer_is_one_that_is_registered(name: str) -> None:
    config = RepAPQConfig(activation_observer=name, percentile=99.0)
    watching = activation_observers(config)
    assert watching and {*watching, lone_activation_observer(config)} <= OBSERVERS.keys()
    for each in watching:
        OBSERVERS[each](**observer_arguments(each, config))
    if name == "auto":
        assert watching == AUTO_CANDIDATES and lone_activation_observer(config) == AUTO_ALONE
    else:
        assert watching == (name,) and lone_activation_observer(config) == name


@pytest.mark.parametrize("name", WEIGHT_OBSERVER_NAMES)
def test_every_name_of_a_weight_observer_is_registered_per_channel(name: str) -> None:
    assert f"per_channel_{name}" in OBSERVERS
    assert name in OBSERVERS
    OBSERVERS[f"per_channel_{name}"]()


def test_only_the_percentile_is_told_more_than_its_grid() -> None:
    config = RepAPQConfig(percentile=98.5)
    assert observer_arguments("percentile", config) == {"percentile": 98.5}
    assert all(observer_arguments(name, config) == {} for name in [*OBSERVER_NAMES, "auto"] if name != "percentile")
