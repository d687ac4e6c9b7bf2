"""Targets: their table, their names, and a target of one's own."""

from __future__ import annotations

import dataclasses
import json

import pytest

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.errors import ConfigError
from repapq_plugin.targets import TARGETS, Rule, Target, find_target
from repapq_plugin.targets.target import GENERIC, RULES


def test_the_table_holds_the_targets_by_their_names() -> None:
    assert list(TARGETS) == [
        *("generic", "openvino", "onnxruntime", "tensorrt", "executorch", "litert", "qnn", "rknn", "coreml"),
    ]
    assert all(name == target.name and target.notes and target.rules for name, target in TARGETS.items())


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_each_rule_stands_once_says_what_happens_and_has_a_source(target: Target) -> None:
    keys = [rule.key for rule in target.rules]
    assert len(keys) == len(set(keys))
    assert all(rule.demand == RULES[rule.key] and rule.effect and rule.source for rule in target.rules)
    if target.symmetric_activations:
        assert "activation_zero_point" in keys
    assert ("shared_grid" in keys) == bool(target.shared_grid_operators)
    assert ("float_operator" in keys) == bool(target.float_operators)
    written = "int8" if target.signed_activations else "uint8"
    assert written in target.activation_types and "int8" in target.weight_types


def test_every_rule_is_one_of_some_target_or_of_ones_own() -> None:
    used = {rule.key for target in TARGETS.values() for rule in target.rules}
    assert set(RULES) - used == {"weight_granularity", "power_of_two"}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_target_of_the_table_states_all_that_its_values_imply(target: Target) -> None:
    assert target.tested == target.rules


def test_a_target_of_ones_own_is_tested_for_what_it_says_of_itself() -> None:
    own = Target("own", signed_activations=True, symmetric_activations=True, power_of_two_scales=True)
    assert {rule.key for rule in own.tested} == {
        *("opset", "activation_type", "weight_type", "scale", "pairs", "bias"),
        *("activation_zero_point", "power_of_two"),
    }
    stricter = dataclasses.replace(TARGETS["rknn"], name="older rknn", weights_per_channel=False)
    assert [rule.key for rule in stricter.tested] == [*(rule.key for rule in stricter.rules), "weight_granularity"]


def test_the_default_is_the_grid_of_before() -> None:
    config = RepAPQConfig()
    assert config.target == GENERIC and config.runs_on is TARGETS[GENERIC]
    assert config.scheme == (
        "W8A8: weights per channel symmetric narrow range (mse), activations per tensor affine unsigned (auto), "
        "constant channels folded, channels equalized, first and last layers 8 bit"
    )


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("tensort", "tensorrt"), ("TensorRT", "tensorrt"), ("onnx-runtime", "onnxruntime"), ("tflite", "litert")],
)
def test_an_unknown_name_is_refused_with_the_list_and_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"target='{name}'.*'generic', 'openvino'.*Did you mean '{nearest}'\?"):
        RepAPQConfig(target=name)
    with pytest.raises(ConfigError, match="Target of your own.$"):
        find_target("zzzz")


@pytest.mark.parametrize("value", [None, 8, ["tensorrt"]])
def test_what_is_no_target_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"target=.*the name of a target"):
        RepAPQConfig(target=value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"symmetric_activations": True}, "signed_activations=True with it"),
        ({"signed_activations": True, "power_of_two_scales": True}, "symmetric_activations=True with it"),
        ({"signed_activations": 1}, "True or False"),
        ({"bias": "int8"}, "'float', 'int32', 'either'"),
        ({"opset": 12}, "13"),
        ({"opset": 20, "max_opset": 19}, "max_opset=19"),
        ({"activation_types": ("int4",)}, "uint8, int8"),
        ({"weight_types": ()}, "uint8, int8"),
        ({"rounded_outputs": ("Relu",)}, "Conv, ConvTranspose, Gemm"),
        ({"notes": "one"}, "a list of texts"),
        ({"rules": ("opset",)}, "a list of Rule"),
        ({"name": ""}, "a text"),
    ],
)
def test_contradictions_are_refused_by_key_and_value(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Target(**{"name": "own", **keys})  # type: ignore[arg-type]


def test_rules_and_keys_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match="rule key='zero'"):
        Rule("zero", "", "")
    with pytest.raises(ConfigError, match=r"target\.bits is not a key"):
        RepAPQConfig(target={"name": "own", "bits": 8})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"target\.name is missing"):
        Target.from_dict({})


def test_a_target_of_ones_own_goes_through_a_config_and_json() -> None:
    own = dataclasses.replace(TARGETS["tensorrt"], name="mine", weights_per_channel=False)
    config = RepAPQConfig(target=own)
    assert config.runs_on == own and "for mine" in config.scheme and "weights per tensor" in config.scheme
    assert RepAPQConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert RepAPQConfig(target=TARGETS["qnn"]).target == "qnn"


def test_few_bits_are_remarked_on_except_where_no_target_was_named() -> None:
    assert TARGETS["tensorrt"].remarks({8}) == [] == TARGETS[GENERIC].remarks({4, 8})
    (remark,) = TARGETS["tensorrt"].remarks({4, 8, 6})
    assert remark.startswith("tensorrt has no integers of 4, 6 bits") and "8-bit" in remark
