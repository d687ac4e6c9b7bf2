"""What learns: each parameter once, at the rate of its grid; and all of it can be brought back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from repapq_plugin.config import LearningRates, RepAPQConfig
from repapq_plugin.method.learners import (
    TIE_MARGIN,
    LayerLearner,
    Learnable,
    Learner,
    learnables_of_layer,
    leave_ties,
    output_magnitudes,
    parameter_groups,
    restore,
    snapshot,
)
from repapq_plugin.method.qpr import attach_affine
from repapq_plugin.quantizers.layers import QuantizedLayer
from tests.support.networks import Pyramid, batches, settle
from tests.support.placed import after

RATES = LearningRates(weight=0.01, scale=0.02, affine=0.04)


@pytest.fixture(scope="module")
def placed_layers() -> dict[str, QuantizedLayer]:
    torch.manual_seed(0)
    job, _ = after("find_ranges", settle(Pyramid()), batches(2), RepAPQConfig.from_preset("w4a4"))
    found = {name: module for name, module in job.backend.student.named_modules() if isinstance(module, QuantizedLayer)}
    for layer in found.values():
        attach_affine(layer)
    return found


@pytest.fixture
def layers(placed_layers: dict[str, QuantizedLayer]) -> dict[str, QuantizedLayer]:
    """Layers of a pyramid, ranges found, affine layers attached; two of them share an input quantizer."""
    return copy.deepcopy(placed_layers)


def learners_of(layers: dict[str, QuantizedLayer]) -> dict[str, Learner]:
    return {name: LayerLearner(layer) for name, layer in layers.items()}


def test_a_layer_learns_in_steps_of_its_own_grids(layers: dict[str, QuantizedLayer]) -> None:
    layer = layers["down1.1.conv"]
    affine = layer.affine
    assert affine is not None
    with torch.no_grad():
        layer.weight.mul_(100)  # far above one step: the share of the bias is a step of the mean weight
    found = {id(each.parameter): each.rate for each in LayerLearner(layer).learnables(3.0, RATES)}
    step = layer.weight_fake_quant.scale.mean().item()
    mean = layer.weight.abs().mean().item()
    wanted: dict[nn.Parameter, float] = {
        layer.weight: 0.01 * step,
        layer.bias: 0.01 * step / mean * 3.0,
        layer.weight_fake_quant.log_scale: 0.02 / 7,
        affine.gamma: 0.04 / 7,
        affine.beta: 0.04 / 7 * 3.0,
        layer.input_fake_quant.log_scale: 0.02 / 15,
    }
    assert found == {id(parameter): pytest.approx(rate) for parameter, rate in wanted.items()}


def test_the_bias_of_a_tiny_weight_moves_by_no_more_than_its_share_of_the_output() -> None:
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight.fill_(1e-9)
    rates = [each.rate for each in learnables_of_layer(layer, 0.1, 2.0, RATES)]
    assert rates == pytest.approx([0.01 * 0.1, 0.01 * 2.0])


def test_what_layers_share_learns_once(layers: dict[str, QuantizedLayer]) -> None:
    learners = learners_of(layers)
    groups = parameter_groups(learners, dict.fromkeys(layers, 1.0), RATES)
    parameters = [parameter for group in groups for parameter in group["params"]]
    assert len({id(parameter) for parameter in parameters}) == len(parameters)
    shared = layers["classes"].input_fake_quant
    assert layers["boxes"].input_fake_quant is shared
    assert sum(parameter is shared.log_scale for parameter in parameters) == 1
    everything = {id(each.parameter) for learner in learners.values() for each in learner.learnables(1.0, RATES)}
    assert {id(parameter) for parameter in parameters} == everything


def test_magnitudes_are_mean_absolute_outputs_and_one_where_nothing_was_called() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))

    class Named:
        def __init__(self, module: nn.Module) -> None:
            self.module = module

    never = nn.Linear(2, 2)
    learners = {"one": Named(network[0]), "two": Named(network[1]), "never": Named(never)}
    x = torch.randn(5, 3)
    found = output_magnitudes(learners, lambda: network(x))  # type: ignore[arg-type]
    hidden = network[0](x)
    assert found == pytest.approx(
        {"one": hidden.abs().mean().item(), "two": network[1](hidden).abs().mean().item(), "never": 1.0}
    )
    assert output_magnitudes(learners, lambda: network(x[:0])) == dict.fromkeys(learners, 1.0)  # type: ignore[arg-type]
    assert not network[0]._forward_hooks


def test_a_snapshot_brings_back_all_that_learning_changes(layers: dict[str, QuantizedLayer]) -> None:
    learners = learners_of(layers)
    before = {name: copy.deepcopy(layer.state_dict()) for name, layer in layers.items()}
    saved = snapshot(learners)
    with torch.no_grad():
        for learner in learners.values():
            for each in learner.learnables(1.0, RATES):
                each.parameter.add_(torch.randn_like(each.parameter))
    assert all(not torch.equal(layer.weight, before[name]["weight"]) for name, layer in layers.items())
    restore(learners, saved)
    for name, layer in layers.items():
        state = layer.state_dict()
        assert state.keys() == before[name].keys()
        assert all(torch.equal(state[key], before[name][key]) for key in state)


def test_all_that_learns_is_in_the_state(layers: dict[str, QuantizedLayer]) -> None:
    for learner in learners_of(layers).values():
        held = {value.data_ptr() for value in learner.state().values()}
        assert all(each.parameter.data_ptr() in held for each in learner.learnables(1.0, RATES))


@pytest.mark.parametrize("enabled", [True, False])
def test_quantizing_and_dropping_go_to_the_quantizers(layers: dict[str, QuantizedLayer], enabled: bool) -> None:
    layer = layers["tower.0"]
    learner = LayerLearner(layer)
    learner.set_quantizing(enabled)
    assert layer.weight_fake_quant.quantizing == layer.input_fake_quant.quantizing == enabled
    learner.set_dropping(enabled)
    assert layer.input_fake_quant.training == enabled
    assert not layer.training and not layer.weight_fake_quant.training


class Offsets:
    """A learner of which only the offsets matter."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = list(tensors)
        self.module = nn.Identity()

    def learnables(self, magnitude: float, rates: LearningRates) -> list[Learnable]:
        return []

    def offsets(self) -> list[Tensor]:
        return self.tensors

    def state(self) -> dict[str, Tensor]:
        return {}

    def set_quantizing(self, enabled: bool) -> None: ...

    def set_dropping(self, enabled: bool) -> None: ...


def test_ties_are_left_by_a_share_of_each_bias_and_shared_ones_move_once() -> None:
    shared, own = torch.tensor([2.0, -3.0, 0.0]), torch.tensor([5.0])
    leave_ties({"one": Offsets(shared, own), "two": Offsets(shared)})
    assert torch.equal(shared, torch.tensor([2.0, -3.0, 0.0]) * (1 + TIE_MARGIN))
    assert torch.equal(own, torch.tensor([5.0]) * (1 + TIE_MARGIN))


def test_the_plugin_s_own_layers_have_no_ties_to_leave(layers: dict[str, QuantizedLayer]) -> None:
    assert all(learner.offsets() == [] for learner in learners_of(layers).values())
