import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.conditioning.constant_channels import OUTLIER, fold_constant_channels


def fold(model: nn.Module, batches: list[torch.Tensor]) -> dict[str, int]:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return fold_constant_channels(model, model, batches, names)


@torch.no_grad()
def network(constant: float, factor: float, *, kernel: int = 1, padding: int = 0, bias: bool = True) -> nn.Sequential:
    """Return a network whose third channel is ``constant``, read with weights ``factor`` times as large as others."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, kernel, padding=padding, bias=bias), nn.ReLU(),
        nn.Conv2d(4, 2, 1),
    ).eval()  # fmt: skip
    model[0].weight[2] = 0
    model[0].bias[2] = constant
    model[2].weight.uniform_(0.5, 1)
    model[2].weight[:, 2] *= factor
    if bias:
        model[2].bias -= constant * model[2].weight[:, 2].flatten(1).sum(1)
    return model


@settings(max_examples=20, deadline=None)
@given(
    constant=st.floats(0, 5),
    factor=st.floats(2 * OUTLIER, 1000),
    kernel=st.sampled_from([1, 3]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_network_computes_what_it_did_and_the_outliers_are_gone(constant, factor, kernel, bias, seed):
    torch.manual_seed(seed)
    model, x = network(constant, factor, kernel=kernel, bias=bias), torch.randn(4, 3, 6, 6)
    with torch.no_grad():
        before = copy.deepcopy(model).double()(x.double())
        assert fold(model, [x, x + 1]) == {"2": 1}
        assert model[2].weight.abs().max() <= 1.0
        # Less of a float32 is lost than before, so float64 is what to compare with.
        assert (model(x).double() - before).abs().max() <= 1e-4 * (1 + constant * factor)


def test_padding_ends_a_constant_unless_it_is_zero():
    x = torch.randn(2, 3, 6, 6)
    before = copy.deepcopy(network(0.7, 300, kernel=3, padding=1))
    model = copy.deepcopy(before)
    assert fold(model, [x]) == {}
    assert torch.equal(model[2].weight, before[2].weight)
    assert fold(network(0.0, 300, kernel=3, padding=1), [x]) == {"2": 1}


def test_a_channel_that_moves_in_any_batch_stays():
    model = network(0.0, 300)
    with torch.no_grad():
        model[0].weight[2, 0] = 1
    quiet, loud = -torch.rand(2, 3, 6, 6), torch.rand(2, 3, 6, 6)
    assert fold(copy.deepcopy(model), [quiet]) == {"2": 1}
    assert fold(model, [quiet, loud, quiet]) == {}


def test_ordinary_weights_stay_though_their_channel_is_silent():
    assert fold(network(0.0, 1.5), [torch.randn(2, 3, 6, 6)]) == {}


def test_weights_that_two_layers_share_stay():
    model = network(0.5, 300)
    other = nn.Conv2d(8, 4, 1)
    other.weight = model[2].weight
    model.add_module("other", nn.Sequential(nn.Conv2d(2, 8, 1), other))
    assert fold(model, [torch.randn(2, 3, 6, 6)]) == {}


@pytest.mark.parametrize("inputs", [4, 12])
def test_linear_layers_read_channels_in_the_last_axis(inputs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 2
        model[2].weight[:, 1] = 90
        x = torch.randn(5, 7, inputs)
        before = model(x)
        assert fold(model, [x]) == {"2": 1}
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_the_outliers_no_longer_cost_the_other_channels_their_codes():
    torch.manual_seed(0)
    model, data = network(0.7, 400), [torch.randn(8, 3, 8, 8) for _ in range(4)]
    error = {}
    for key in (False, True):
        config = RepAPQConfig.from_preset("w8a8", first_last_bits=None, steps=0, equalize=False, fold_constants=key)
        result = quantize_model(model, data, config)
        with torch.no_grad():
            error[key] = float((result.model(data[0]) - model(data[0])).abs().mean())
    assert error[True] < 0.1 * error[False]
