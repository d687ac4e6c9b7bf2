"""The plan of a network's quantizers, and the network built from it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.tensors import floating_tensors
from repapq_plugin.errors import CalibrationError, ConfigError
from repapq_plugin.policy import KEPT_FLOAT, NO_CHANNEL_AXIS, bits_of
from repapq_plugin.quantizers.layers import QuantizedLayer
from repapq_plugin.quantizers.plan import LayerPlan, insert_quantizers, plan_layers
from repapq_plugin.quantizers.trace import Trace, trace_network
from tests.support.networks import Chain, Pyramid, Tied, batches, settle
from tests.support.placed import after

NOT_CALLED = "not called in a forward pass; if its weight is used by a function, that runs in float"


def traced(model: nn.Module) -> tuple[nn.Module, Trace]:
    """A merged network and its trace."""
    _, state = after("plan", settle(model), batches(1), RepAPQConfig())
    return state.teacher, state.trace


def plans_of(model: nn.Module, trace: Trace, **keys: object) -> dict[str, LayerPlan]:
    return plan_layers(model, trace, RepAPQConfig.from_preset("w4a5", **keys))[0]


@pytest.mark.parametrize(
    "keys", [{}, {"layer_bits": {"*.0*": (3, 6)}}, {"reduce_range": True}, {"keep_float": ("*1",)}]
)
def test_every_layer_that_was_called_has_a_plan_by_the_policy_or_a_reason(keys: dict[str, object]) -> None:
    model, trace = traced(Pyramid())
    config = RepAPQConfig.from_preset("w4a5", **keys)
    plans, reasons = plan_layers(model, trace, config)
    assert set(plans) | set(reasons) == set(trace.layers) and not set(plans) & set(reasons)
    assert list(plans) == [name for name in trace.layers if name in plans]
    for name, plan in plans.items():
        assert (plan.weight_bits, plan.activation_bits) == bits_of(name, trace.layers[name].at_an_end, config)
    assert bool(reasons) == ("keep_float" in keys) and set(reasons.values()) <= {KEPT_FLOAT}


def test_layers_share_a_quantizer_if_they_read_one_tensor_with_as_many_bits() -> None:
    model, trace = traced(Pyramid())
    plans = plans_of(model, trace)
    for one, others in (
        {"classes": {"boxes"}, "boxes": {"classes"}, "lateral.0": {"down2.0.conv"}, "up": set()}
    ).items():
        group = {name for name, plan in plans.items() if plan.input_group == plans[one].input_group}
        assert group == {one, *others}
    apart = plans_of(model, trace, layer_bits={"boxes": (4, 3)})
    assert apart["boxes"].input_group != apart["classes"].input_group


def test_what_cannot_be_quantized_has_its_reason() -> None:
    network = Pyramid()
    network.up = nn.ConvTranspose2d(8, 8, 2, 2, groups=2)
    model, trace = traced(network)
    plans, reasons = plan_layers(model, trace, RepAPQConfig())
    assert reasons == {"up": NO_CHANNEL_AXIS} and "up" not in plans


def test_nothing_left_and_names_that_do_not_exist_are_errors() -> None:
    model, trace = traced(Chain())
    with pytest.raises(CalibrationError, match=r"but stem\.conv, .* which stay float \(kept float by"):
        plan_layers(model, trace, RepAPQConfig(keep_float=("*",)))
    with pytest.raises(CalibrationError, match=r"called no convolution or linear layer of its own\."):
        plan_layers(model, Trace({}, {}), RepAPQConfig())
    with pytest.raises(ConfigError, match="layer_bits: the pattern 'stem'"):
        plan_layers(model, trace, RepAPQConfig(layer_bits={"stem": (4, 4)}))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_and_counted_unless_it_stays_float(value: float) -> None:
    model, trace = traced(Chain())
    with torch.no_grad():
        model.get_submodule("fc").weight[:2, 0] = value
    with pytest.raises(CalibrationError, match=r"weight of 'fc' is not finite: 2 of 80 .* Check the checkpoint\."):
        plan_layers(model, trace, RepAPQConfig())
    assert "fc" not in plan_layers(model, trace, RepAPQConfig(keep_float=("fc",)))[0]


def test_a_network_built_from_the_plan_has_its_bits_its_groups_and_its_numbers() -> None:
    model, trace = traced(Pyramid())
    plans = plans_of(model, trace)
    placed, x = copy.deepcopy(model), batches(1)[0]
    layers = insert_quantizers(placed, plans, RepAPQConfig(drop_probability=0.25))
    assert list(layers) == list(plans)
    for name, layer in layers.items():
        plan = plans[name]
        assert placed.get_submodule(name) is layer
        assert layer.weight_fake_quant.num_bits == plan.weight_bits
        assert layer.input_fake_quant.num_bits == plan.activation_bits
        assert layer.input_fake_quant.drop_probability == 0.25 and layer.weight_fake_quant.drop_probability == 0
        assert not layer.input_fake_quant.observing and not layer.weight_fake_quant.observing
        assert layer.training == model.get_submodule(name).training
        assert layer.bias is not None
        for other, others in plans.items():
            same = layers[other].input_fake_quant is layer.input_fake_quant
            assert same == (plan.input_group == others.input_group)
        layer.weight_fake_quant.enable_fake_quant(False)
        layer.input_fake_quant.enable_fake_quant(False)
    wanted, found = floating_tensors(model(x)), floating_tensors(placed(x))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_a_layer_that_stands_twice_stays_one_object() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    layers = insert_quantizers(model, {"0": LayerPlan(4, 4, 0), "2": LayerPlan(4, 4, 1)}, RepAPQConfig())
    assert model[0] is model[2] is layers["0"] is layers["2"]
    assert isinstance(model[0], QuantizedLayer)


def test_the_plan_of_one_network_is_that_of_its_copy() -> None:
    model, trace = traced(Pyramid())
    again = copy.deepcopy(model)
    x = batches(1)[0]
    assert plans_of(again, trace_network(again, lambda: again(x))) == plans_of(model, trace)


def test_layers_of_one_weight_share_its_quantizer_with_the_bits_of_the_one_that_needs_most() -> None:
    model, trace = traced(Tied())
    plans = plans_of(model, trace, layer_bits={"fine": (3, 6)})
    assert trace.layers["coarse"].last
    assert (plans["fine"].weight_bits, plans["fine"].activation_bits) == (8, 6)
    assert plans["coarse"].weight_bits == 8 and plans["down"].weight_bits == 4
    layers = insert_quantizers(model, plans, RepAPQConfig())
    fine, coarse = layers["fine"], layers["coarse"]
    assert fine.weight is coarse.weight and fine.weight_fake_quant is coarse.weight_fake_quant
    assert fine.bias is not coarse.bias and fine.input_fake_quant is not coarse.input_fake_quant
    assert len({layer.weight_fake_quant for layer in layers.values()}) == len(layers) - 1


def test_a_weight_that_two_layers_share_takes_no_affine_layer() -> None:
    job, _ = after("find_ranges", settle(Tied()), batches(1), RepAPQConfig())
    job.backend.attach_affine()
    layers = {name: job.backend.student.get_submodule(name) for name in job.backend.plans}
    assert [name for name, layer in layers.items() if layer.affine is None] == ["fine", "coarse"]


def test_what_holds_a_matrix_of_weights_and_runs_in_float_is_named_and_a_norm_is_not() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.unused = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)
            self.norm, self.recurrent, self.slope = nn.GroupNorm(2, 4), nn.GRU(4, 4, batch_first=True), nn.PReLU(4)
            self.by_function = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.slope(self.norm(self.stem(x)))
            x = nn.functional.conv2d(x, self.by_function.weight)
            return self.recurrent(x.flatten(2).transpose(1, 2))[0]

    model, trace = traced(Mixed())
    plans, reasons = plan_layers(model, trace, RepAPQConfig())
    assert list(plans) == ["stem"]
    assert reasons == {
        "unused": NOT_CALLED, "by_function": NOT_CALLED, "recurrent": "GRU runs in float"
    }  # fmt: skip
