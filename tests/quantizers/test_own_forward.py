"""Layers with forwards of their own: what they multiply decides whether they are quantized, and as what."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from repapq_plugin.core.modules import own_class
from repapq_plugin.quantizers.layers import BakedLayer, QuantizedLayer, float_layer, output_channels, quantize_layer
from repapq_plugin.quantizers.own_forward import bake_weights, calls_of, is_plain, products_of, reason_against
from tests.support.export_networks import input_quantizer
from tests.support.own_layers import (
    BiasApart,
    ByMatmul,
    FixedBias,
    FromInput,
    Gated,
    OtherEachTime,
    Padded,
    Scaled,
    Standardized,
    StandardizedLinear,
    Twice,
)


class Renamed(nn.Conv2d):
    """A class of its own that runs torch's forward."""


class OtherConvolution(nn.Conv2d):
    """Torch's forward, but what it calls is another."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x.relu(), weight, bias)


TORCHS = (
    nn.Conv1d(2, 3, 3),
    nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
    nn.Conv3d(2, 3, 1),
    nn.ConvTranspose2d(2, 3, 2),
    nn.Linear(2, 3),
    Renamed(2, 3, 1),
)


def images(*shape: int) -> tuple[Tensor]:
    return (torch.randn(*(shape or (2, 3, 6, 6))),)


@pytest.mark.parametrize("layer", TORCHS, ids=lambda layer: type(layer).__name__)
def test_a_layer_that_runs_torchs_forward_is_plain_in_a_role_as_well(layer: nn.Module) -> None:
    assert is_plain(layer)
    assert reason_against(layer, ((), {})) == ""  # nothing is run to know it
    quantized = quantize_layer(copy.deepcopy(layer), input_quantizer(8), input_quantizer(8))
    assert is_plain(quantized) and is_plain(float_layer(quantized))


def test_another_forward_of_class_or_object_is_not_plain() -> None:
    assert not is_plain(Padded(3, 4, 3))
    assert not is_plain(OtherConvolution(3, 4, 3))
    layer = nn.Conv2d(3, 4, 3)
    layer.forward = lambda x: functional.conv2d(x.relu(), layer.weight, layer.bias)  # type: ignore[method-assign]
    assert not is_plain(layer)


@pytest.mark.parametrize("bias", [True, False])
def test_padding_of_its_own_is_no_reason(bias: bool) -> None:
    layer = Padded(3, 4, 3, stride=2, bias=bias)
    assert reason_against(layer, (images(), {})) == ""
    assert reason_against(layer, ((), {"x": images()[0]})) == ""


REASONS: dict[str, tuple[nn.Module, str]] = {
    "twice": (Twice(3, 4, 3), "the forward of Twice makes 2 products instead of one"),
    "matmul": (ByMatmul(6, 4), "the forward of ByMatmul multiplies with matmul instead of a layer's own function"),
    "both": (Gated(6, 6), "the forward of Gated makes 2 products instead of one"),
    "input": (
        OtherConvolution(3, 4, 3),
        "the forward of OtherConvolution changes its input before it is multiplied",
    ),
    "bias": (BiasApart(3, 4, 3), "the forward of BiasApart does not add its bias to the product"),
    "no bias": (BiasApart(3, 4, 3, bias=False), "the forward of BiasApart does not add its bias to the product"),
    "weight": (FromInput(3, 4, 3), "the forward of FromInput multiplies another tensor than its weight"),
    "standardized": (Standardized(3, 4, 3), "the forward of Standardized multiplies another tensor than its weight"),
    "alone": (
        FixedBias(3, 4, 3, bias=False),
        "the forward of FixedBias cannot be run alone with a bias (ValueError: this layer has no bias)",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_whoever_multiplies_otherwise_stays_float_with_the_reason(name: str) -> None:
    layer, reason = REASONS[name]
    assert reason_against(layer, (images(), {})) == reason


@pytest.mark.parametrize("name", [*REASONS, "padded"])
def test_asking_for_the_reason_changes_nothing(name: str) -> None:
    layer = copy.deepcopy(REASONS[name][0] if name in REASONS else Padded(3, 4, 3, bias=False)).train()
    seen: list[str] = []
    layer.register_forward_hook(lambda *_: seen.append("called"))
    contents, state = dict(vars(layer)), copy.deepcopy(layer.state_dict())
    weight = layer.weight
    reason_against(layer, (images(), {}))
    assert not seen and layer.training and len(layer._forward_hooks) == 1
    assert vars(layer) == contents and layer.weight is weight
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    assert layer.state_dict().keys() == state.keys()


def test_products_are_seen_by_their_operands() -> None:
    layer, (x,) = Padded(3, 4, 3), images()
    [product] = products_of(layer, ((x,), {})).products
    assert product.weight is layer.weight and product.bias is layer.bias
    assert torch.equal(product.source, layer.padded(x))
    assert [product.source for product in products_of(nn.Conv2d(3, 4, 1), ((x,), {})).products] == [x]
    assert products_of(ByMatmul(6, 4), ((x,), {})).others == ["matmul"]


def test_calls_are_noted_with_all_arguments_and_hooks_come_off_again() -> None:
    up, never = nn.ConvTranspose2d(3, 3, 2, 2), nn.Conv2d(3, 3, 1)
    x, y = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 2, 2)

    def run() -> None:
        up(x, output_size=[8, 8])
        up(input=y)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        calls_of([up, never], run)
    assert not up._forward_pre_hooks

    found = calls_of([up, never], lambda: (up(x, output_size=[8, 8]), up(input=y)))
    assert found == {up: [((x,), {"output_size": [8, 8]}), ((), {"input": y})]}


MADE: dict[str, Callable[[], nn.Module]] = {
    "standardized": lambda: Standardized(3, 4, 3, padding=1),
    "standardized without bias": lambda: Standardized(3, 4, 3, bias=False),
    "scaled": lambda: Scaled(3, 4, 3),
    "linear": lambda: StandardizedLinear(6, 4),
}


@pytest.mark.parametrize("name", MADE)
def test_a_weight_made_of_the_weight_is_baked_and_the_output_is_the_same_bit_for_bit(name: str) -> None:
    model = nn.Sequential(MADE[name](), nn.ReLU()).eval()
    plain, (x,) = copy.deepcopy(model), images()
    keys = list(model.state_dict())
    assert bake_weights(model, lambda: model(x)) == ("0",)
    layer = model[0]
    assert isinstance(layer, BakedLayer) and own_class(layer) is type(plain[0])
    made = plain[0].made()
    assert torch.equal(layer.weight, made) and not torch.equal(made, plain[0].weight)
    assert isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad
    assert list(model.state_dict()) == keys
    for other in (x, torch.randn(1, 3, 8, 6)):
        assert torch.equal(model(other), plain(other))
    assert reason_against(layer, ((x,), {})) == ""


@pytest.mark.parametrize("name", MADE)
def test_a_baked_layer_that_is_quantized_multiplies_its_rounded_weight_and_stays_baked_without(name: str) -> None:
    model = nn.Sequential(MADE[name]()).eval()
    plain, (x,) = copy.deepcopy(model), images()
    bake_weights(model, lambda: model(x))
    weight, of_input = input_quantizer(4), input_quantizer(8)
    layer = quantize_layer(model[0], weight, of_input)
    layer(x)
    assert isinstance(layer, QuantizedLayer) and not isinstance(layer, BakedLayer)
    [product] = products_of(layer, ((x,), {})).products
    assert torch.equal(product.weight, weight(layer.weight)) and len(product.weight.unique()) <= 16
    assert torch.equal(layer.float_forward(x), plain(x))
    for quantizer in (weight, of_input):
        quantizer.enable_fake_quant(False)
    assert torch.equal(layer(x), plain(x))
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), plain(x))
    assert isinstance(float_layer(copied), BakedLayer) and torch.equal(copied(x), plain(x))


def test_a_weight_that_does_not_learn_goes_on_so() -> None:
    model, (x,) = nn.Sequential(Standardized(3, 4, 3)).requires_grad_(False), images()
    assert bake_weights(model, lambda: model(x)) == ("0",)
    assert not model[0].weight.requires_grad


UNBAKED: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(3, 4, 3),
    "padded": lambda: Padded(3, 4, 3),
    "from its input": lambda: FromInput(3, 4, 3),
    "another each time": lambda: OtherEachTime(3, 4, 3),
    "two products": lambda: Twice(3, 4, 3),
    "matmul": lambda: ByMatmul(6, 4),
}


@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_a_weight_that_is_the_same_for_all_large_inputs_is_not_baked(shift: float) -> None:
    layer, x = FromInput(3, 4, 3).eval(), images()[0] + shift
    assert torch.equal(layer(x), layer._conv_forward(x, layer.weight * (1 + x.mean().sign()), layer.bias))
    assert bake_weights(layer, lambda: layer(x)) == ()


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("name", UNBAKED)
def test_nothing_else_is_baked(name: str, keyword: bool) -> None:
    layer = UNBAKED[name]().eval()
    (x,) = images()
    kind, weight, contents = type(layer), layer.weight, dict(vars(layer))
    named = {"input" if type(layer) is nn.Conv2d else "x": x}
    assert bake_weights(layer, lambda: layer(**named) if keyword else layer(x)) == ()
    assert type(layer) is kind and layer.weight is weight and vars(layer).keys() == contents.keys()


def test_what_is_not_called_is_not_baked() -> None:
    model, (x,) = nn.ModuleList([Standardized(3, 4, 3), Standardized(3, 4, 3)]).eval(), images()
    assert bake_weights(model, lambda: model[1](x)) == ("1",)
    assert type(model[0]) is Standardized


def test_a_network_in_which_baking_does_not_come_out_the_same_is_left_alone() -> None:
    class Odd(Standardized):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + float(self.weight.detach().sum())

    model, (x,) = nn.Sequential(Odd(3, 4, 3)).eval(), images()
    plain, weight = copy.deepcopy(model), model[0].weight
    assert bake_weights(model, lambda: model(x)) == ()
    assert type(model[0]) is Odd and model[0].weight is weight
    assert torch.equal(model(x), plain(x))
    assert output_channels(model[0]) == 4
