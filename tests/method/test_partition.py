import pytest
import timm
import torch
from torch import nn

from repapq_plugin.errors import ConfigError
from repapq_plugin.job import merge_for_inference
from repapq_plugin.method.partition import find_stages, find_units
from repapq_plugin.quantizers.trace import trace_network
from tests.support.networks import Chain, Pyramid, settle


def partition(model: nn.Module, size: int = 16, units=(), stages=()):
    x = torch.randn(2, 3, size, size)
    merged = merge_for_inference(model, lambda m: m(x))[0]
    trace = trace_network(merged, lambda: merged(x))
    found = find_units(merged, trace, list(trace.layers), units)
    return found, find_stages(merged, trace, found, stages)


def test_blocks_are_units_and_their_containers_stages():
    units, stages = partition(settle(Chain()))
    assert [unit.name for unit in units] == ["stem", *(f"stages.{s}.{b}" for s in range(3) for b in range(2)), "fc"]
    assert [stage.name for stage in stages] == ["stem", "stages.0", "stages.1", "stages.2", "fc"]


def test_a_plain_layer_takes_its_norm_and_activation_along():
    units, stages = partition(settle(Pyramid()))
    assert "lateral" in [unit.name for unit in units]
    assert "tower" in [unit.name for unit in units]
    assert [stage.name for stage in stages][:2] == ["down1", "down2"]


def test_every_unit_is_in_exactly_one_stage_and_order_is_that_of_the_calls():
    units, stages = partition(settle(Pyramid()))
    assert [unit for stage in stages for unit in stage.units] == units


def test_stages_of_a_real_network_are_not_its_trunk():
    _, stages = partition(timm.create_model("repvgg_a0").eval(), size=64)
    assert [stage.name for stage in stages] == ["stem", "stages.0", "stages.1", "stages.2", "stages.3.0", "head"]


def test_users_name_units_and_stages_by_pattern():
    units, stages = partition(settle(Chain()), units=("stages.1",), stages=("stages.0", "stages.2"))
    assert "stages.1" in [unit.name for unit in units]
    assert [stage.name for stage in stages] == ["stem", "stages.0", "stages.1", "stages.2", "fc"]


def test_a_pattern_that_matches_nothing_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match=r"stages: the pattern 'layer\*'"):
        partition(settle(Chain()), stages=("layer*",))
