"""The layer that carries its quantizers: without them it is the float layer, bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize, PerChannelLearnableFakeQuantize
from repapq_plugin.quantizers.layers import (
    QUANTIZABLE,
    ChannelAffine,
    QuantizedLayer,
    apply_layer,
    output_channels_axis,
    quantize_layer,
)

LAYERS = {
    "conv": (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 7, 6)),
    "strided": (nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding=(2, 1)), (2, 4, 9, 8)),
    "grouped": (nn.Conv2d(4, 8, 3, groups=2, bias=False), (2, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 5, padding="same", groups=4), (2, 4, 5, 5)),
    "reflected": (nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (1, 3, 5, 5)),
    "circular": (nn.Conv2d(3, 5, 3, padding=(2, 1), padding_mode="circular"), (1, 3, 5, 5)),
    "unbatched": (nn.Conv2d(3, 5, 3), (3, 5, 5)),
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


@pytest.mark.parametrize("name", LAYERS)
def test_switched_off_it_is_the_float_layer(name: str) -> None:
    layer, shape = LAYERS[name]
    wrapped = quantized(layer)
    for quantizer in (wrapped.weight_fake_quant, wrapped.input_fake_quant):
        quantizer.enable_fake_quant(False)
    x = torch.randn(shape)
    assert torch.equal(wrapped(x), layer(x))
    assert torch.equal(apply_layer(layer, x, layer.weight), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_switched_on_it_is_the_float_layer_on_quantized_tensors(name: str) -> None:
    layer, shape = LAYERS[name]
    wrapped = quantized(layer)
    x = torch.randn(shape)
    wrapped(x)
    assert wrapped.weight_fake_quant.scale.shape == (wrapped.out_channels,)
    weight, hat = wrapped.weight_fake_quant(layer.weight), wrapped.input_fake_quant(x)
    assert torch.equal(wrapped(x), apply_layer(layer, hat, weight))
    assert not torch.equal(wrapped(x), layer(x))


def test_a_transposed_convolution_takes_the_output_size_that_it_is_asked_for() -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2)
    wrapped = quantized(layer)
    for quantizer in (wrapped.weight_fake_quant, wrapped.input_fake_quant):
        quantizer.enable_fake_quant(False)
    x = torch.randn(1, 4, 5, 5)
    for size in ([11, 11], [12, 11]):
        assert torch.equal(wrapped(x, output_size=size), layer(x, output_size=size))


@pytest.mark.parametrize("name", LAYERS)
def test_an_affine_layer_starts_as_the_identity_and_then_works_per_channel(name: str) -> None:
    layer, shape = LAYERS[name]
    with torch.no_grad():
        y = layer(torch.randn(shape))
    linear = isinstance(layer, nn.Linear)
    channels = layer.out_features if linear else layer.out_channels
    affine = ChannelAffine(channels, channels_last=linear, like=layer.weight)
    assert torch.equal(affine(y), y)
    with torch.no_grad():
        affine.gamma.copy_(torch.randn(channels))
        affine.beta.copy_(torch.randn(channels))
    axis = -1 if linear else -3
    parts = [affine.gamma[c] * part + affine.beta[c] for c, part in enumerate(y.unbind(axis))]
    assert torch.equal(affine(y), torch.stack(parts, axis))


def test_an_affine_layer_is_made_like_the_weight() -> None:
    affine = ChannelAffine(4, channels_last=False, like=torch.empty(1, dtype=torch.float64))
    assert affine.gamma.dtype == affine.beta.dtype == torch.float64


def test_gradients_reach_everything_that_learns() -> None:
    layer = nn.Conv2d(3, 4, 3)
    wrapped = quantized(layer)
    wrapped.affine = ChannelAffine(4, channels_last=False, like=layer.weight)
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    wrapped(x)
    for quantizer in (wrapped.weight_fake_quant, wrapped.input_fake_quant):
        quantizer.enable_observer(False)
    wrapped(x).square().mean().backward()
    learned = dict(wrapped.named_parameters())
    assert set(learned) == {
        "layer.weight",
        "layer.bias",
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
        wrapped = quantized(layer)
        assert wrapped.weight is layer.weight, name
        assert wrapped.bias is layer.bias, name
        assert isinstance(layer, QUANTIZABLE)
        assert layer.weight.shape[output_channels_axis(layer)] == wrapped.out_channels


def test_a_half_precision_layer_stays_half() -> None:
    layer = nn.Linear(5, 7).to(torch.bfloat16)
    x: Tensor = torch.randn(2, 5).to(torch.bfloat16)
    assert quantized(layer)(x).dtype == torch.bfloat16
