"""Layers with a forward of their own, or with shared parameters, stay as they are; what cannot be done is told."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from repapq_plugin.conditioning.channels import is_plain, tied_parameters
from repapq_plugin.conditioning.constant_channels import fold_constant_channels
from repapq_plugin.conditioning.equalize import Equalized, equalize_channels, find_links
from repapq_plugin.core.modules import become
from repapq_plugin.quantizers.layers import BakedLayer


class Standardized(nn.Conv2d):
    """Multiplies a function of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight / self.weight.abs().mean(), self.bias)


class Padded(nn.Conv2d):
    """Pads by itself."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(functional.pad(input, (1, 1, 1, 1), value=1.0), weight, bias)


class Normed(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(functional.layer_norm(input, input.shape[-1:]), self.weight, self.bias)


class Renamed(nn.Conv2d):
    """Is torch's, under another name."""


class WithState(nn.Conv2d):
    """Only adds an attribute."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.f = -1


def with_own_forward(layer: nn.Module) -> nn.Module:
    own = layer.forward
    layer.forward = lambda x: own(x) * 2
    return layer


LAYERS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "convolution": (lambda: nn.Conv2d(4, 4, 1), True),
    "linear": (lambda: nn.Linear(4, 4), True),
    "subclass of the same forward": (lambda: Renamed(4, 4, 1), True),
    "subclass with an attribute": (lambda: WithState(4, 4, 1), True),
    "standardized": (lambda: Standardized(4, 4, 1), False),
    "padded": (lambda: Padded(4, 4, 1), False),
    "normed": (lambda: Normed(4, 4), False),
    "a forward of the instance": (lambda: with_own_forward(nn.Conv2d(4, 4, 1)), False),
    "baked": (lambda: become(Standardized(4, 4, 1), BakedLayer), False),
    "of another kind": (lambda: nn.Conv1d(4, 4, 1), False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_plain_layers_run_torchs_own_forward(name: str) -> None:
    make, plain = LAYERS[name]
    assert is_plain(make()) == plain


def chain(first: nn.Module, second: nn.Module) -> nn.Sequential:
    return nn.Sequential(first, nn.ReLU(), second).eval()


def equalize(model: nn.Module, x: Tensor) -> Equalized:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        return equalize_channels(model, model, [x], names)


def uneven(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        layer.weight[0] *= 100
    return layer


@pytest.mark.parametrize("name", ["standardized", "padded", "a forward of the instance", "baked"])
@pytest.mark.parametrize("first", [True, False])
def test_channels_next_to_a_layer_with_a_forward_of_its_own_stay(name: str, first: bool) -> None:
    torch.manual_seed(0)
    layers = [LAYERS[name][0](), uneven(nn.Conv2d(4, 4, 1))]
    model, x = chain(*(layers if first else layers[::-1])), torch.randn(2, 4, 6, 6)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert equalize(model, x) == Equalized()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Steeper(nn.ReLU):
    """Is not homogeneous."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input - 1)


def test_an_activation_with_a_forward_of_its_own_is_not_taken_for_its_class() -> None:
    torch.manual_seed(0)
    layers = [uneven(nn.Conv2d(4, 4, 1)), Steeper(), nn.Conv2d(4, 4, 1)]
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 4, 6, 6)
    assert find_links(model, lambda: model(x), layers) == []
    layers[1] = model[1] = nn.ReLU()
    assert find_links(model, lambda: model(x), layers) == [(layers[0], [layers[2]])]
    model[1].forward = lambda input: functional.relu(input - 1)
    assert find_links(model, lambda: model(x), layers) == []


def one_object(one: nn.Module, other: nn.Module) -> None:
    other.weight = one.weight


def one_memory(one: nn.Module, other: nn.Module) -> None:
    other.weight.data = one.weight.data


def one_bias(one: nn.Module, other: nn.Module) -> None:
    other.bias = one.bias


class Tied(nn.Module):
    """A chain, and a layer beside it that shares with the middle one."""

    def __init__(self, tie: Callable[[nn.Module, nn.Module], None]) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.beside = nn.Linear(4, 4)
        tie(self.middle, self.beside)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x).relu()).relu()) + self.beside(x * 3)


ties = pytest.mark.parametrize("tie", [one_object, one_memory, one_bias])


@ties
def test_layers_that_share_parameters_are_not_equalized(tie: Callable[[nn.Module, nn.Module], None]) -> None:
    torch.manual_seed(0)
    model, x = Tied(tie).eval(), torch.randn(5, 4)
    assert len(tied_parameters(model)) in (1, 2)
    layers = [model.first, model.middle, model.last, model.beside]
    assert find_links(model, lambda: model(x), layers) == []


@ties
def test_layers_that_share_parameters_keep_what_constant_channels_add(
    tie: Callable[[nn.Module, nn.Module], None],
) -> None:
    torch.manual_seed(0)
    model, x = Tied(tie).eval(), torch.randn(5, 4)
    with torch.no_grad():
        model.first.weight[0], model.first.bias[0] = 0.0, 2.0
        model.middle.weight[:, 0] = 300.0
        wanted = model(x)
        assert fold_constant_channels(model, model, [x], ["middle", "beside"]) == {}
        assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("name", ["standardized", "padded", "normed", "a forward of the instance", "baked"])
def test_a_constant_channel_of_a_layer_with_a_forward_of_its_own_stays(name: str) -> None:
    torch.manual_seed(0)
    linear = name == "normed"
    model = nn.Sequential(LAYERS[name][0]()).eval()
    x = torch.randn(5, 4) if linear else torch.randn(2, 4, 6, 6)
    x[:, 0] = 2.0
    with torch.no_grad():
        model[0].weight[:, 0] = 300.0
        wanted = model(x)
        assert fold_constant_channels(model, model, [x], ["0"]) == {}
        assert torch.equal(model(x), wanted)


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = uneven(nn.Conv2d(4, 4, 1)), nn.ReLU(), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(input=self.act(input=self.first(input=x)))


def test_layers_called_by_keyword_are_equalized() -> None:
    torch.manual_seed(0)
    model, x = ByKeyword().eval(), torch.randn(2, 4, 6, 6)
    wanted = model(x)
    assert equalize(model, x) == Equalized(("first",))
    assert (model(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_constant_channel_of_a_layer_called_by_keyword_is_folded() -> None:
    torch.manual_seed(0)
    model, x = ByKeyword().eval(), torch.randn(2, 4, 6, 6)
    x[:, 0] = 2.0
    with torch.no_grad():
        model.first.weight[:, 0] = 300.0
        wanted = model(x)
        assert fold_constant_channels(model, model, [x], ["first"]) == {"first": 1}
        assert (model(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


class LooksAtAWeight(nn.Module):
    """Its output depends on how large a weight is."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = chain(uneven(nn.Conv2d(4, 4, 1)), nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) * self.chain[0].weight.abs().max().detach().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_changes_the_output_is_undone_and_told(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, x = LooksAtAWeight().eval().to(dtype), torch.randn(2, 4, 6, 6).to(dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        equalized = equalize(model, x)
    assert equalized.layers == () and equalized.notes == (
        "Equalizing channels changes what the network computes; it is left as it was.",
    )
    assert equalized.notes[0] in caplog.text
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_equalized(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = chain(uneven(nn.Conv2d(4, 4, 1)), nn.Conv2d(4, 4, 1)).to(dtype)
    x = torch.randn(2, 4, 6, 6).to(dtype)
    assert equalize(model, x) == Equalized(("0",))
