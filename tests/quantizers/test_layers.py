"""The layer that carries its quantizers: without them it is the float layer, bit by bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize, PerChannelLearnableFakeQuantize
from repapq_plugin.quantizers.layers import (
    QUANTIZABLE,
    ChannelAffine,
    QuantizedLayer,
    affine_positions,
    apply_layer,
    bias_of,
    float_layer,
    output_channels,
    output_channels_axis,
    quantize_layer,
    weight_of,
)

LAYERS = {
    "conv": (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 7, 6)),
    "strided": (nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding=(2, 1)), (2, 4, 9, 8)),
    "grouped": (nn.Conv2d(4, 8, 3, groups=2, bias=False), (2, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 5, padding="same", groups=4), (2, 4, 5, 5)),
    "reflected": (nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (1, 3, 5, 5)),
    "circular": (nn.Conv2d(3, 5, 3, padding=(2, 1), padding_mode="circular"), (1, 3, 5, 5)),
    "unbatched": (nn.Conv2d(3, 5, 3), (3, 5, 5)),
    "signal": (nn.Conv1d(3, 8, 3, stride=2, padding=1), (2, 3, 9)),
    "signal_alone": (nn.Conv1d(4, 6, 5, groups=2, padding=2, padding_mode="replicate", bias=False), (4, 8)),
    "volume": (nn.Conv3d(3, 4, 3, padding=(1, 0, 1)), (2, 3, 4, 5, 4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5, 4)),
    "transposed_bare": (nn.ConvTranspose2d(4, 6, (2, 3), padding=1, dilation=2, bias=False), (2, 4, 5, 4)),
    "linear": (nn.Linear(5, 7), (3, 5)),
    "linear_tokens": (nn.Linear(5, 7, bias=False), (2, 4, 5)),
    "linear_vector": (nn.Linear(5, 7), (5,)),
}


def quantized(layer: nn.Module, weight_bits: int = 4) -> QuantizedLayer:
    bound = 2 ** (weight_bits - 1) - 1
    weight_quantizer = PerChannelLearnableFakeQuantize(
        quant_min=-bound, quant_max=bound, ch_axis=output_channels_axis(layer)
    )
    return quantize_layer(layer, weight_quantizer, LearnableFakeQuantize(quant_min=0, quant_max=15))


def pair(name: str) -> tuple[nn.Module, QuantizedLayer, Tensor]:
    """A float layer, its copy with quantizers, and an input."""
    layer, shape = LAYERS[name]
    return layer, quantized(copy.deepcopy(layer)), torch.randn(shape)


def switch_off(layer: QuantizedLayer) -> QuantizedLayer:
    for quantizer in (layer.weight_fake_quant, layer.input_fake_quant):
        quantizer.enable_fake_quant(False)
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_switched_off_it_is_the_float_layer(name: str) -> None:
    layer, carrying, x = pair(name)
    switch_off(carrying)
    assert torch.equal(carrying(x), layer(x))
    assert torch.equal(apply_layer(layer, x, weight_of(layer)), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_switched_on_it_is_the_float_layer_on_quantized_tensors(name: str) -> None:
    layer, carrying, x = pair(name)
    carrying(x)
    assert carrying.weight_fake_quant.scale.shape == (output_channels(layer),)
    weight, hat = carrying.weight_fake_quant(weight_of(layer)), carrying.input_fake_quant(x)
    assert torch.equal(carrying(x), apply_layer(layer, hat, weight))
    assert not torch.equal(carrying(x), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_its_float_forward_is_that_of_the_float_layer_whatever_is_switched_on(name: str) -> None:
    layer, carrying, x = pair(name)
    carrying(x)
    assert torch.equal(carrying.float_forward(x), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_it_may_be_called_by_keyword(name: str) -> None:
    _, carrying, x = pair(name)
    carrying(x)
    assert torch.equal(carrying(input=x), carrying(x))
    assert not torch.equal(carrying(input=x), carrying.float_forward(x))


@pytest.mark.parametrize("name", LAYERS)
def test_it_is_the_same_object_and_plain_again_when_the_quantizers_are_taken_off(name: str) -> None:
    layer, shape = LAYERS[name]
    subject = copy.deepcopy(layer)
    carrying = quantized(subject)
    assert carrying is subject and isinstance(carrying, QuantizedLayer) and isinstance(carrying, type(layer))
    assert list(carrying.state_dict())[: len(layer.state_dict())] == list(layer.state_dict())
    assert float_layer(carrying) is subject and type(subject) is type(layer)
    assert vars(subject).keys() == vars(layer).keys() and not list(subject.children())
    x = torch.randn(shape)
    assert torch.equal(subject(x), layer(x))
    assert subject.state_dict().keys() == layer.state_dict().keys()


def test_a_transposed_convolution_takes_the_output_size_that_it_is_asked_for() -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2)
    carrying = switch_off(quantized(copy.deepcopy(layer)))
    x = torch.randn(1, 4, 5, 5)
    for size in ([11, 11], [12, 11]):
        for arguments in (((x, size), {}), ((x,), {"output_size": size}), ((), {"output_size": size, "input": x})):
            args, kwargs = arguments
            assert carrying(*args, **kwargs).shape[2:] == tuple(size)
            assert torch.equal(carrying(*args, **kwargs), layer(x, output_size=size))
    with pytest.raises(ValueError, match="requested an output size"):
        carrying(x, output_size=[20, 20])
    assert weight_of(carrying) is carrying._parameters["weight"]  # a forward that fails leaves nothing behind


class Padding(nn.Conv2d):
    """A convolution with a forward, an attribute and a property of its own."""

    def __init__(self, *args: int, **keys: int) -> None:
        super().__init__(*args, **keys)
        self.before = (1, 2, 0, 1)

    @property
    def widest(self) -> int:
        return max(self.before) + self.kernel_size[0]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, self.before))


def test_a_class_of_the_users_keeps_its_forward_its_attributes_and_its_properties() -> None:
    layer = Padding(3, 4, 3)
    layer.f, layer.i = -1, 5
    carrying, x = quantized(copy.deepcopy(layer)), torch.randn(2, 3, 6, 6)
    carrying(x)
    assert isinstance(carrying, Padding) and carrying.widest == 5
    assert (carrying.f, carrying.i, carrying.before) == (-1, 5, layer.before)
    hat = nn.functional.pad(carrying.input_fake_quant(x), layer.before)
    assert torch.equal(carrying(x), apply_layer(layer, hat, carrying.weight_fake_quant(weight_of(layer))))
    assert torch.equal(switch_off(carrying)(x), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_an_affine_layer_starts_as_the_identity_and_then_works_per_channel(name: str) -> None:
    layer, shape = LAYERS[name]
    with torch.no_grad():
        y = layer(torch.randn(shape))
    channels, positions = output_channels(layer), affine_positions(layer)
    assert positions == {nn.Linear: 0, nn.Conv1d: 1, nn.Conv3d: 3}.get(type(layer), 2)
    affine = ChannelAffine(channels, positions, like=weight_of(layer))
    assert torch.equal(affine(y), y)
    with torch.no_grad():
        affine.gamma.copy_(torch.randn(channels))
        affine.beta.copy_(torch.randn(channels))
    axis = -1 - positions
    parts = [affine.gamma[c] * part + affine.beta[c] for c, part in enumerate(y.unbind(axis))]
    assert torch.equal(affine(y), torch.stack(parts, axis))


def test_an_affine_layer_is_made_like_the_weight() -> None:
    affine = ChannelAffine(4, 2, like=torch.empty(1, dtype=torch.float64))
    assert affine.gamma.dtype == affine.beta.dtype == torch.float64


def test_gradients_reach_everything_that_learns() -> None:
    layer = nn.Conv2d(3, 4, 3)
    carrying = quantized(layer)
    carrying.affine = ChannelAffine(4, 2, like=layer.weight)
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    carrying(x)
    for quantizer in (carrying.weight_fake_quant, carrying.input_fake_quant):
        quantizer.enable_observer(False)
    carrying(x).square().mean().backward()
    learned = dict(carrying.named_parameters())
    assert set(learned) == {
        "weight",
        "bias",
        "weight_fake_quant.log_scale",
        "input_fake_quant.log_scale",
        "affine.gamma",
        "affine.beta",
    }
    assert all(parameter.grad.abs().sum() > 0 for parameter in learned.values())
    assert x.grad.abs().sum() > 0


def test_layers_may_share_the_quantizer_of_what_they_read() -> None:
    shared = LearnableFakeQuantize(quant_min=0, quant_max=15)
    first, second = (quantize_layer(nn.Linear(3, 2), PerChannelLearnableFakeQuantize(), shared) for _ in range(2))
    both = nn.ModuleList([first, second])
    assert len(list(both.parameters())) == 2 * 3 + 1


def test_weight_and_bias_are_the_layers_own() -> None:
    for name, (layer, _) in LAYERS.items():
        subject = copy.deepcopy(layer)
        weight, bias = subject.weight, subject.bias
        carrying = quantized(subject)
        assert carrying.weight is weight and weight_of(carrying) is weight, name
        assert carrying.bias is bias and bias_of(carrying) is bias, name
        assert torch.equal(weight, layer.weight)
        assert isinstance(carrying, QUANTIZABLE)
        assert weight.shape[output_channels_axis(carrying)] == output_channels(carrying)


def test_the_place_of_the_float_layer_in_earlier_versions_answers_with_the_layer_itself() -> None:
    carrying = quantized(nn.Linear(3, 2))
    assert carrying.layer is carrying
    with pytest.raises(AttributeError, match="'nowhere'"):
        carrying.nowhere  # noqa: B018
    assert not any(key.startswith("layer.") for key in carrying.state_dict())


def test_a_half_precision_layer_stays_half() -> None:
    layer = nn.Linear(5, 7).to(torch.bfloat16)
    x: Tensor = torch.randn(2, 5).to(torch.bfloat16)
    assert quantized(layer)(x).dtype == torch.bfloat16
