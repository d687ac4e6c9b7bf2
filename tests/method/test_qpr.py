"""QPR: attaching the affine layer changes nothing, and folding it changes no integer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from repapq_plugin.core.quant_primitives import quantize, weight_bounds
from repapq_plugin.errors import MergeError
from repapq_plugin.method import qpr
from repapq_plugin.method.qpr import attach_affine, fold_affine, integer_weight
from repapq_plugin.observers import MinMaxObserver, PerChannelMSEObserver
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize, PerChannelLearnableFakeQuantize
from repapq_plugin.quantizers.layers import (
    ChannelAffine,
    QuantizedLayer,
    affine_positions,
    apply_layer,
    output_channels,
    output_channels_axis,
    quantize_layer,
)

seeds = st.integers(0, 2**32 - 1)
bit_widths = st.integers(2, 8)
KINDS = ("conv", "depthwise", "no_bias", "transposed", "linear")
kinds = st.sampled_from(KINDS)


def float_layer(kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    match kind:
        case "conv":
            return nn.Conv2d(4, 6, 3, padding=1), (2, 4, 6, 6)
        case "depthwise":
            return nn.Conv2d(5, 5, 3, groups=5, stride=2), (2, 5, 7, 7)
        case "no_bias":
            return nn.Conv2d(4, 6, 1, bias=False), (2, 4, 4, 4)
        case "transposed":
            return nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 3, 3)
        case _:
            return nn.Linear(8, 6), (3, 8)


def quantized_layer(kind: str, bits: int, weight: LearnableFakeQuantize | None = None) -> tuple[QuantizedLayer, Tensor]:
    """A layer with its scales set and frozen observers, and an input for it."""
    layer, shape = float_layer(kind)
    low, high = weight_bounds(bits)
    if weight is None:
        weight = PerChannelLearnableFakeQuantize(quant_min=low, quant_max=high, ch_axis=output_channels_axis(layer))
    quantized = quantize_layer(layer, weight, LearnableFakeQuantize(quant_min=0, quant_max=2**bits - 1))
    x = torch.randn(shape)
    quantized(x)
    for quantizer in (quantized.weight_fake_quant, quantized.input_fake_quant):
        quantizer.enable_observer(False)
    return quantized, x


def learned_affine(layer: QuantizedLayer, gamma: Tensor | None = None) -> None:
    """Attach an affine layer and give it values as extreme as learning could: negative, zero, tiny, large."""
    attach_affine(layer)
    assert layer.affine is not None
    channels = output_channels(layer)
    if gamma is None:
        gamma = torch.randn(channels) * 10.0 ** torch.randint(-12, 3, (channels,))
        gamma[0], gamma[1] = 0.0, -gamma[1].abs() - 0.1
    with torch.no_grad():
        layer.affine.gamma.copy_(gamma)
        layer.affine.beta.copy_(torch.randn(channels))


def rounding_bound(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """What float32 may be off by per channel: in proportion to all that is added up, signs aside."""
    assert layer.affine is not None
    magnitudes = copy.deepcopy(layer)
    if magnitudes.bias is not None:
        magnitudes.bias.data = magnitudes.bias.data.abs()
    hat = layer.input_fake_quant(x).abs()
    total = apply_layer(magnitudes, hat, layer.weight_fake_quant(layer.weight).abs())
    absolute = ChannelAffine(output_channels(layer), affine_positions(layer), layer.weight)
    absolute.gamma.data, absolute.beta.data = layer.affine.gamma.data.abs(), layer.affine.beta.data.abs()
    return 2e-5 * absolute(total)


def operations(layer: QuantizedLayer, x: Tensor) -> list[str]:
    """Names of all operations that one forward pass runs."""
    names: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self,
            func: Callable[..., object],
            types: object,
            args: tuple[object, ...] = (),
            kwargs: dict[str, object] | None = None,
        ) -> object:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Recorder():
        layer(x)
    return names


@pytest.mark.parametrize("kind", KINDS)
def test_attaching_changes_not_one_bit(kind: str) -> None:
    layer, x = quantized_layer(kind, 4)
    before = layer(x)
    attach_affine(layer)
    assert torch.equal(layer(x), before)


@given(seed=seeds, kind=kinds, bits=bit_widths)
def test_folding_keeps_integers_and_outputs(seed: int, kind: str, bits: int) -> None:
    torch.manual_seed(seed)
    layer, x = quantized_layer(kind, bits)
    learned_affine(layer)
    assert layer.affine is not None
    gamma, codes = layer.affine.gamma.detach().clone(), integer_weight(layer)
    expected, bound = layer(x), rounding_bound(layer, x)
    scale = layer.weight_fake_quant.scale.detach().clone()
    fold_affine(layer)
    shape = [1] * codes.dim()
    shape[output_channels_axis(layer)] = -1
    assert torch.equal(integer_weight(layer), codes * torch.sign(gamma).int().reshape(shape))
    learned = gamma != 0
    assert torch.allclose(layer.weight_fake_quant.scale[learned], (scale * gamma.abs())[learned], rtol=1e-5)
    assert ((layer(x) - expected).abs() <= bound).all()


@given(seed=seeds, kind=kinds, bits=bit_widths)
def test_afterwards_the_weights_lie_on_their_grid(seed: int, kind: str, bits: int) -> None:
    torch.manual_seed(seed)
    layer, x = quantized_layer(kind, bits)
    learned_affine(layer)
    fold_affine(layer)
    assert torch.equal(layer.weight_fake_quant(layer.weight), layer.weight)
    output, codes = layer(x).detach(), integer_weight(layer)
    fold_affine(layer)  # nothing left to fold
    assert torch.equal(integer_weight(layer), codes)
    assert torch.allclose(layer(x), output, rtol=1e-5, atol=1e-6 * float(output.abs().max()))


@given(seed=seeds, bits=bit_widths)
def test_codes_in_the_middle_between_two_are_those_that_were_simulated(seed: int, bits: int) -> None:
    torch.manual_seed(seed)
    layer, _ = quantized_layer("linear", bits)
    scale = layer.weight_fake_quant.scale.detach()[:, None]
    halves = torch.randint(-(2**bits), 2**bits, layer.weight.shape) + 0.5
    with torch.no_grad():
        layer.weight.copy_(halves * scale)
    simulated = layer.weight_fake_quant(layer.weight)
    assert torch.allclose(integer_weight(layer) * scale, simulated, rtol=1e-5, atol=0)
    fold_affine(layer)
    assert torch.allclose(layer.weight, simulated, rtol=1e-5, atol=0)


def test_nothing_is_left_behind() -> None:
    plain, x = quantized_layer("no_bias", 4)
    folded = copy.deepcopy(plain)
    learned_affine(folded)
    fold_affine(folded)
    assert folded.affine is None
    assert not any(isinstance(module, ChannelAffine) for module in folded.modules())
    assert set(folded.state_dict()) == {*plain.state_dict(), "bias"}
    assert operations(folded, x) == operations(plain, x)
    attach_affine(plain)
    assert len(operations(plain, x)) > len(operations(folded, x)) > 0


def test_the_fold_by_hand() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -1.0], [2.0, 0.25]]))
        layer.bias.copy_(torch.tensor([1.0, -1.0]))
    weight = PerChannelLearnableFakeQuantize(quant_min=-7, quant_max=7)
    weight.enable_observer(False)
    weight.set_qparams(torch.tensor([0.25, 0.5]), torch.zeros(2))
    quantized = quantize_layer(layer, weight, LearnableFakeQuantize())
    learned_affine(quantized, torch.tensor([-2.0, 0.5]))
    assert quantized.affine is not None
    quantized.affine.beta.data = torch.tensor([10.0, 20.0])
    assert integer_weight(quantized).tolist() == [[2, -4], [4, 0]]
    fold_affine(quantized)
    assert integer_weight(quantized).tolist() == [[-2, 4], [4, 0]]
    assert weight.scale.tolist() == pytest.approx([0.5, 0.25])
    assert quantized.weight.tolist() == [pytest.approx([-1.0, 2.0]), pytest.approx([1.0, 0.0])]
    assert quantized.bias is not None and quantized.bias.tolist() == pytest.approx([8.0, 19.5])


@pytest.mark.parametrize("kind", KINDS)
def test_a_per_tensor_scheme_is_quantized_again_and_says_so(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    low, high = weight_bounds(8)
    scheme = {"qscheme": torch.per_tensor_symmetric, "quant_min": low, "quant_max": high, "dtype": torch.qint8}
    layer, x = quantized_layer(kind, 8, LearnableFakeQuantize(observer=MinMaxObserver, **scheme))
    learned_affine(layer, torch.linspace(0.5, -2.0, output_channels(layer)))
    expected = layer(x)
    with caplog.at_level(logging.WARNING):
        fold_affine(layer)
    assert "per_tensor_symmetric" in caplog.text and f"{output_channels(layer)} channels" in caplog.text
    assert layer.weight_fake_quant.scale.shape == (1,)
    assert torch.equal(layer.weight_fake_quant(layer.weight), layer.weight)
    inputs = layer.weight[:, 0].numel() if kind == "transposed" else layer.weight[0].numel()
    step = layer.weight_fake_quant.scale.item()
    assert (layer(x) - expected).abs().max() <= 0.51 * step * inputs * layer.input_fake_quant(x).abs().max() + 1e-5


def test_a_per_tensor_scheme_with_shifts_alone_is_exact_and_silent(caplog: pytest.LogCaptureFixture) -> None:
    scheme = {"qscheme": torch.per_tensor_symmetric, "quant_min": -7, "quant_max": 7}
    layer, x = quantized_layer("conv", 4, LearnableFakeQuantize(observer=MinMaxObserver, **scheme))
    learned_affine(layer, torch.ones(6))
    expected = layer(x)
    fold_affine(layer)
    assert not caplog.records
    assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_a_code_that_cannot_change_its_sign_is_quantized_again(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(qpr.logger, "warning", lambda text, *values: said.append(text % values))
    for gamma, warns in ((1.5, False), (-1.5, True)):
        said.clear()
        weight = PerChannelLearnableFakeQuantize(observer=PerChannelMSEObserver, quant_min=-8, quant_max=7)
        layer, x = quantized_layer("linear", 4, weight)
        with torch.no_grad():
            layer.weight[2, 3] = -8 * weight.scale[2]
        assert integer_weight(layer).min() == -8
        learned_affine(layer, torch.full((6,), gamma))
        expected = layer(x)
        fold_affine(layer)
        assert bool(said) == warns
        codes = quantize(layer.weight, *weight.calculate_qparams(), -8, 7, 0)
        assert torch.equal(integer_weight(layer), codes) and codes.min() >= -8
        relative = (layer(x) - expected).abs().mean() / expected.abs().mean()
        assert relative < (0.2 if warns else 1e-5)


def test_a_grouped_transposed_convolution_is_refused() -> None:
    layer = nn.ConvTranspose2d(4, 6, 2, groups=2)
    quantized = quantize_layer(layer, PerChannelLearnableFakeQuantize(ch_axis=1), LearnableFakeQuantize())
    with pytest.raises(MergeError, match="2 groups"):
        attach_affine(quantized)


def test_frozen_weights_stay_frozen() -> None:
    layer, _ = quantized_layer("no_bias", 4)
    layer.weight.requires_grad_(False)
    learned_affine(layer)
    fold_affine(layer)
    assert layer.bias is not None and not layer.bias.requires_grad
