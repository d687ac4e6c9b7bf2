import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repapq_plugin.errors import ConfigError
from repapq_plugin.mimicnorm import Recipe, WeightMean, parametrize_weight_mean, remove_weight_mean, takes_weight_mean

BY_FAN_IN = Recipe(min_fan_in=50)
"""Small filters are left alone."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 4, 5),
    )  # fmt: skip


def largest_mean(weight: torch.Tensor) -> float:
    return float(weight.detach().flatten(1).mean(1).abs().max())


@pytest.mark.parametrize(
    ("layer", "taken"),
    [
        (nn.Conv2d(3, 8, 3), False),
        (nn.Conv2d(6, 8, 3), True),
        (nn.Conv2d(64, 64, 9, groups=64), False),
        (nn.Conv2d(64, 64, 3, groups=2), True),
        (nn.Conv1d(32, 4, 2), True),
        (nn.Linear(50, 4), False),
        (nn.Linear(51, 4), True),
        (nn.ConvTranspose2d(64, 64, 3), False),
        (nn.BatchNorm2d(64), False),
    ],
)
def test_which_layers_take_it_by_their_fan_in(layer, taken):
    assert takes_weight_mean(layer, BY_FAN_IN) is taken


@pytest.mark.parametrize(
    ("layer", "taken"),
    [
        (nn.Conv2d(3, 8, 3), True),
        (nn.Conv2d(1, 8, 3), False),
        (nn.Conv2d(16, 8, 1), True),
        (nn.Conv2d(9, 8, 1), False),
        (nn.Conv2d(64, 64, 9, groups=64), False),
        (nn.Conv2d(64, 64, 3, groups=2), True),
        (nn.Conv1d(32, 4, 1), True),
        (nn.Linear(16, 4), True),
        (nn.ConvTranspose2d(64, 64, 3), False),
    ],
)
def test_which_layers_take_it_by_a_smaller_fan_in(layer, taken):
    assert takes_weight_mean(layer, {"min_fan_in": 9}) is taken


@pytest.mark.parametrize(
    ("layer", "taken"),
    [
        (nn.Conv2d(1, 8, 3), True),
        (nn.Conv2d(2, 8, 1), True),
        (nn.Conv2d(1, 8, 1), False),  # filters of one weight would vanish
        (nn.Conv2d(64, 64, 9, groups=64), False),
        (nn.Linear(512, 4), False),
    ],
)
def test_all_dense_convolutions_take_it_by_the_authors_recipe(layer, taken):
    assert takes_weight_mean(layer, "authors") is taken


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_filter_means_are_zero_after_every_step(kind):
    model, x = network(), torch.randn(8, 3, 8, 8)
    optimizer = kind(model.parameters(), lr=0.1)
    first, depthwise = model[0].weight.clone(), model[2].weight.clone()
    handle = WeightMean(model, BY_FAN_IN).attach(optimizer)
    for _ in range(5):
        assert largest_mean(model[3].weight) <= 1e-7
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert largest_mean(model[3].weight) <= 1e-7
    # Those that are left alone learn without it.
    assert largest_mean(model[0].weight) > 1e-4 < largest_mean(model[2].weight)
    assert not torch.equal(model[0].weight, first)
    assert not torch.equal(model[2].weight, depthwise)
    handle.remove()
    model(x).square().mean().backward()
    optimizer.step()
    assert largest_mean(model[3].weight) > 1e-7


@settings(max_examples=10, deadline=None)
@given(momentum=st.sampled_from([0.0, 0.9]), decay=st.sampled_from([0.0, 1e-2]), seed=st.integers(0, 99))
def test_both_ways_are_equal_under_gradient_descent(momentum, decay, seed):
    model = network().double()
    other = copy.deepcopy(model)
    assert parametrize_weight_mean(other, BY_FAN_IN) == ["3"]
    optimizers = [
        torch.optim.SGD(net.parameters(), lr=0.05, momentum=momentum, weight_decay=decay) for net in (model, other)
    ]
    WeightMean(model, BY_FAN_IN).attach(optimizers[0])
    generator = torch.Generator().manual_seed(seed)
    for _ in range(4):
        x = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
        for net, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    remove_weight_mean(other)
    assert set(model.state_dict()) == set(other.state_dict())
    for key, value in model.state_dict().items():
        assert torch.allclose(value, other.state_dict()[key], rtol=1e-9, atol=1e-12), key


def test_averaged_weights_and_resumed_training_keep_the_means_at_zero():
    model, x = network(), torch.randn(8, 3, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    WeightMean(model).attach(optimizer)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
    assert largest_mean(average.module[3].weight) <= 1e-7
    resumed = network()
    resumed.load_state_dict(model.state_dict())
    again = torch.optim.SGD(resumed.parameters(), lr=0.1, momentum=0.9)
    again.load_state_dict(optimizer.state_dict())
    WeightMean(resumed).attach(again)
    resumed(x).square().mean().backward()
    again.step()
    assert not torch.equal(resumed[3].weight, model[3].weight)
    assert largest_mean(resumed[3].weight) <= 1e-7


def test_frozen_weights_stay():
    model = network()
    model[3].requires_grad_(False)
    before = model[3].weight.clone()
    WeightMean(model, BY_FAN_IN).apply()
    assert parametrize_weight_mean(model, BY_FAN_IN) == []
    assert torch.equal(model[3].weight, before)


def test_a_shared_weight_counts_once_and_cannot_be_parametrized():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    model[1].weight = model[0].weight
    weight_mean = WeightMean(model)
    assert len(weight_mean.layers) == 1
    weight_mean.apply()
    assert largest_mean(model[1].weight) <= 1e-7
    with pytest.raises(ConfigError, match="1 and 0 share one weight"):
        parametrize_weight_mean(model)


def test_lazy_layers_are_an_error():
    with pytest.raises(ConfigError, match="run the model once"):
        WeightMean(nn.Sequential(nn.LazyConv2d(8, 3)))


def test_half_precision_weights_are_projected_in_float32():
    layer = nn.Conv2d(64, 4, 3).to(torch.bfloat16)
    wide = layer.weight.detach().float() + 1  # a mean that bfloat16 cannot hold
    with torch.no_grad():
        layer.weight.copy_(wide)
    stored = layer.weight.detach().float()
    WeightMean(nn.Sequential(layer)).apply()
    assert layer.weight.dtype == torch.bfloat16
    expected = (stored - stored.flatten(1).mean(1).reshape(-1, 1, 1, 1)).to(torch.bfloat16)
    assert torch.equal(layer.weight, expected)
    rounded = layer.weight.new_tensor(stored) - layer.weight.new_tensor(stored).flatten(1).mean(1).reshape(-1, 1, 1, 1)
    assert not torch.equal(layer.weight, rounded)


def test_parametrizing_twice_changes_nothing():
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(6)))
    names = parametrize_weight_mean(model)
    assert parametrize_weight_mean(model) == names == [str(i) for i in range(6)]
    assert all(len(layer.parametrizations.weight) == 1 for layer in model)
    assert len(WeightMean(model).layers) == 6


def test_a_weight_that_something_else_computes_is_an_error_for_the_step_hook():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)))
    with pytest.raises(ConfigError, match="The weight of 0 is computed by a parametrization"):
        WeightMean(model)
    parametrize_weight_mean(model)
    assert largest_mean(model[0].weight) <= 1e-7
