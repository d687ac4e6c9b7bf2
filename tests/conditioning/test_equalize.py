import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.conditioning.equalize import LIMIT, channel_scales, equalize_channels, find_links


def names_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def equalize(model: nn.Module, x: torch.Tensor) -> tuple[str, ...]:
    with torch.no_grad():
        return equalize_channels(model, model, [x], names_of(model)).layers


def separable(channels: int = 6, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, channels, 1),
        activation(),
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
        activation(),
        nn.Conv2d(channels, 5, 1),
    ).eval()


@settings(max_examples=25, deadline=None)
@given(
    exponents=st.lists(st.floats(-6, 6), min_size=6, max_size=6),
    groups=st.sampled_from([1, 2, 6]),
    seed=st.integers(0, 99),
)
def test_the_network_computes_what_it_did_whatever_its_channels(exponents, groups, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=bool(seed % 2)), nn.LeakyReLU(0.1), nn.Conv2d(6, 6, 3, groups=groups), nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 1),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[0].weight.mul_(torch.tensor(exponents).exp2().reshape(-1, 1, 1, 1))
        x = torch.randn(2, 3, 12, 12)
        before = model(x)
        assert equalize(model, x) == ("0", "2")
        assert (model(x) - before).abs().max() <= 1e-5 * before.abs().max()


def test_in_front_of_depthwise_layers_all_channels_become_equally_large():
    model, x = separable(), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        model[0].bias.zero_()
        model[0].weight[2] *= 50
        model[0].weight[4] /= 50
    equalize(model, x)
    sizes = model[:2](x).abs().amax(dim=(0, 2, 3))
    assert sizes.max() <= 1.001 * sizes.min()


def test_one_loud_sample_does_not_decide_over_all_channels():
    torch.manual_seed(0)
    x, found = torch.randn(4, 3, 8, 8), []
    for loudness in (1.0, 1000.0):
        torch.manual_seed(1)
        model = separable()
        with torch.no_grad():
            model[0].bias.zero_()
        equalize(model, x * torch.tensor([loudness, 1.0, 1.0, 1.0]).reshape(-1, 1, 1, 1))
        found.append(model[0].weight.detach().clone())
    assert torch.allclose(*found, rtol=1e-5)


def test_in_front_of_dense_layers_activations_and_weights_meet_halfway():
    scales = channel_scales(torch.tensor([1.0, 16.0]).double(), [nn.Conv2d(2, 3, 1)])
    reader = nn.Conv2d(2, 3, 1)
    nn.init.ones_(reader.weight)
    scales = channel_scales(torch.tensor([1.0, 16.0]).double(), [reader])
    assert torch.allclose(scales[1] / scales[0], torch.tensor(4.0).double())
    assert torch.allclose(scales.prod(), torch.tensor(1.0).double())


def test_dead_channels_stay_and_no_factor_exceeds_the_limit():
    reader = nn.Conv2d(3, 3, 1, groups=3)
    assert channel_scales(torch.zeros(3).double(), [reader]).tolist() == [1.0] * 3
    scales = channel_scales(torch.tensor([0.0, 1e-12, 1e12]).double(), [reader])
    assert scales.tolist() == [1.0, 1 / LIMIT, LIMIT]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.a(x)
        return self.b(y) + y


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.b(self.b(self.a(x)))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.b(functional.hardswish(self.a(x)))


class Returned(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.a(x)
        return y, self.b(y)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.c.weight = self.b.weight

    def forward(self, x):
        return self.b(self.a(x)) + self.c(x)


class Columns(nn.Module):
    """A linear layer over the width of an image reads no channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("kind", [Columns, Residual, Twice, Functional, Returned, Shared])
def test_what_anything_else_reads_or_shares_is_left_alone(kind):
    model = kind().eval()
    before = copy.deepcopy(model.state_dict())
    assert equalize(model, torch.randn(2, 3, 4, 4)) == ()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU6, nn.Sigmoid, nn.Hardswish])
def test_an_activation_that_is_not_homogeneous_ends_the_link(activation):
    assert equalize(separable(activation=activation), torch.randn(2, 3, 4, 4)) == ()


def test_layers_that_stay_float_are_not_touched():
    model, x = separable(), torch.randn(2, 3, 4, 4)
    assert [model[2] in {maker, *readers} for maker, readers in find_links(model, lambda: model(x), {model[0]})] == []


def test_a_tensor_may_have_several_readers():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 4, 3, groups=4)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x):
            y = self.act(self.a(x))
            return self.b(y), self.c(y)

    model, x = Fork().eval(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        before = model(x)
        assert equalize(model, x) == ("a",)
        for actual, expected in zip(model(x), before, strict=True):
            torch.testing.assert_close(actual, expected)


def test_a_nearly_dead_channel_no_longer_costs_the_others_their_codes():
    model, data = separable(16), [torch.randn(8, 3, 8, 8) for _ in range(4)]
    with torch.no_grad():
        model[2].weight[0] /= 300
        model[2].bias[0] /= 300
        model[4].weight[:, 0] *= 300
    error = {}
    for key in (False, True):
        result = quantize_model(
            model, data, RepAPQConfig.from_preset("w8a8", first_last_bits=None, steps=0, equalize=key)
        )
        with torch.no_grad():
            error[key] = float((result.model(data[0]) - model(data[0])).abs().mean())
    assert error[True] < 0.5 * error[False]


class Choosing(nn.Module):
    """Makes much of a little: what it returns depends on the last bits of a layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.body = separable()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (1e6 * self.body(x)).sin()


def test_rounding_that_a_network_makes_much_of_is_no_reason_against():
    torch.manual_seed(0)
    model, x = Choosing().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model.body[0].weight[2] *= 50
        before = model(x)
        equalized = equalize_channels(model, model, [x], ["body.0", "body.2", "body.4"])
        assert (model(x) - before).abs().max() > 0.1
    assert equalized.layers == ("body.0", "body.2") and equalized.notes == ()


def test_only_what_does_something_else_stays_as_it_was():
    torch.manual_seed(0)
    model, x = separable(), torch.randn(2, 3, 8, 8)
    model[4].register_forward_hook(lambda layer, args, output: output + float(layer.weight.abs().max()))
    kept = model[4].weight.clone()
    with torch.no_grad():
        model[0].weight[2] *= 50
        before = model(x)
        equalized = equalize_channels(model, model, [x], names_of(model))
        assert (model(x) - before).abs().max() <= 1e-5 * before.abs().max()
    note = "Equalizing channels behind 2 changes what the network computes; it is left as it was."
    assert equalized.layers == ("0",) and equalized.notes == (note,)
    assert torch.equal(model[4].weight, kept)


def test_a_hook_that_cuts_an_output_off_stands_between_layers():
    model, x = separable(), torch.randn(2, 3, 8, 8)
    model[0].register_forward_hook(lambda _, args, output: output.clamp(max=100.0))
    assert equalize(model, x) == ("2",)
