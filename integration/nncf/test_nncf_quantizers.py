"""NNCF's quantizers: setting steps, learning in logarithms, and few bits carried in eight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nncf.common.quantization.structs import QuantizationScheme
from nncf.torch.quantization.layers import AsymmetricQuantizer, BaseQuantizer, PTQuantizerSpec, SymmetricQuantizer

from repapq_plugin.core.quant_primitives import fake_quantize
from repapq_plugin.hosts.nncf.quantizers import (
    RangeClamp,
    carry,
    channel_axis,
    in_logarithms,
    learnable,
    observer_for,
    set_num_bits,
    set_qparams,
    step_of,
)


def _make(kind: str, bits: int) -> BaseQuantizer:
    asymmetric = kind == "asymmetric"
    shape = (5, 1, 1, 1) if kind == "weight" else (1,)
    spec = PTQuantizerSpec(
        num_bits=8,
        mode=QuantizationScheme.ASYMMETRIC if asymmetric else QuantizationScheme.SYMMETRIC,
        signedness_to_force=None if asymmetric else kind != "unsigned",
        narrow_range=kind == "weight",
        half_range=False,
        scale_shape=shape,
        logarithm_scale=False,
    )
    quantizer = AsymmetricQuantizer(spec) if asymmetric else SymmetricQuantizer(spec)
    set_num_bits(quantizer, bits)
    return quantizer


def _data(kind: str) -> torch.Tensor:
    x = torch.randn(5, 6, 3, 3) * torch.tensor([0.1, 1.0, 3.0, 0.5, 2.0]).reshape(-1, 1, 1, 1)
    return {"unsigned": x.relu(), "asymmetric": x + 0.7}.get(kind, x)


KINDS = ("weight", "signed", "unsigned", "asymmetric")


@pytest.mark.parametrize("bits", [8, 6, 4, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantizer_does_what_its_observer_says(kind: str, bits: int) -> None:
    quantizer, x = _make(kind, bits), _data(kind)
    observer = observer_for(quantizer, "min_max")
    assert (observer.quant_min, observer.quant_max) == (quantizer.level_low, quantizer.level_high)
    observer(x)
    scale, zero_point = observer.calculate_qparams()
    set_qparams(quantizer, scale, zero_point)
    torch.testing.assert_close(step_of(quantizer).flatten(), scale)
    axis = channel_axis(quantizer)
    wanted = fake_quantize(x, scale, zero_point, quantizer.level_low, quantizer.level_high, axis)
    got = quantizer.quantize(x).detach()
    # A value in the middle between two codes may go either way.
    step = scale.reshape(quantizer.scale_shape)
    assert float(((got - wanted).abs() / step).max()) <= 1.001
    assert float(((got - wanted).abs() / step > 0.01).float().mean()) < 0.02


@pytest.mark.parametrize("bits", [7, 6, 4, 3, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_few_bits_carried_in_eight_are_the_same_codes(kind: str, bits: int) -> None:
    quantizer, x = _make(kind, bits), _data(kind)
    observer = observer_for(quantizer, "mse")
    observer(x)
    set_qparams(quantizer, *observer.calculate_qparams())
    few = quantizer.quantize(2 * x).detach()
    clamp = carry(quantizer)
    assert quantizer.num_bits == 8
    if kind == "weight":
        carried = quantizer.quantize(few).detach()  # weights are laid on their grid instead of clamped
    else:
        assert isinstance(clamp, RangeClamp)
        carried = quantizer.quantize(clamp(2 * x)).detach()
    assert len(few.unique()) <= (5 if kind == "weight" else 1) * 2**bits
    torch.testing.assert_close(carried, few, rtol=1e-5, atol=1e-6)


def test_eight_bits_are_not_touched_by_carrying() -> None:
    quantizer = _make("signed", 8)
    set_qparams(quantizer, torch.tensor([0.37]), torch.tensor([0]))
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    assert carry(quantizer) is None
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_learn_as_logarithms_and_come_back_positive(kind: str) -> None:
    quantizer, x = _make(kind, 8), _data(kind)
    observer = observer_for(quantizer, "min_max")
    observer(x)
    set_qparams(quantizer, *observer.calculate_qparams())
    before, wanted = step_of(quantizer).clone(), quantizer.quantize(x).detach()
    with in_logarithms([quantizer]):
        torch.testing.assert_close(quantizer.quantize(x).detach(), wanted, rtol=1e-4, atol=1e-4)
        (quantizer.quantize(x) - x).square().sum().backward()
        length = learnable(quantizer)["length"]
        assert length.grad is not None and bool(torch.isfinite(length.grad).all())
    torch.testing.assert_close(step_of(quantizer), before)
    with in_logarithms([quantizer]), torch.no_grad():
        learnable(quantizer)["length"].sub_(50)
    assert bool((learnable(quantizer)["length"] > 0).all())


def test_logarithms_end_with_an_error_too() -> None:
    quantizer = _make("signed", 8)
    before = step_of(quantizer).clone()
    with pytest.raises(KeyError), in_logarithms([quantizer]):
        raise KeyError
    torch.testing.assert_close(step_of(quantizer), before)
    assert not quantizer.is_using_log_scale_storage


def test_a_clamp_is_rebuilt_from_its_config() -> None:
    clamp = RangeClamp(-1.5, 2.25)
    config: dict[str, Any] = clamp.get_config()
    x = torch.linspace(-4, 4, 33)
    assert torch.equal(RangeClamp.from_config(config)(x), x.clamp(-1.5, 2.25))
