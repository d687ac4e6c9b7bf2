"""The learnable fake quantizers: values, gradients and state."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.ao.quantization.observer import MinMaxObserver as TorchMinMaxObserver

from repapq_plugin.core.quant_primitives import fake_quantize
from repapq_plugin.errors import CalibrationError, ConfigError
from repapq_plugin.observers import (
    MAEObserver,
    MinMaxObserver,
    MSEObserver,
    PercentileObserver,
    PerChannelMinMaxObserver,
    RangeObserver,
)
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize, PerChannelLearnableFakeQuantize
from tests.support.fake_quantizers import per_channel, per_tensor, ready

seeds = st.integers(0, 2**32 - 1)


def away_from_ties(x: Tensor, scale: Tensor) -> Tensor:
    """Move every value a little, where needed, off the middle between two codes."""
    steps = x / scale
    near = ((steps - steps.floor()) - 0.5).abs() < 0.05
    return torch.where(near, (steps + 0.1) * scale, x).detach()


def lsq_gradient(x: Tensor, upstream: Tensor, scale: Tensor, zero_point: Tensor, bounds: tuple[int, int]) -> Tensor:
    """Elements of ``d loss / d scale`` (LSQ, arXiv:1902.08153, eq. 3, with a zero point)."""
    steps = x / scale
    codes = torch.round(steps) + zero_point
    inside = torch.round(steps) - steps
    below, above = codes < bounds[0], codes > bounds[1]
    gradient = torch.where(below, bounds[0] - zero_point, torch.where(above, bounds[1] - zero_point, inside))
    return gradient * upstream


# Values and gradients


@given(seed=seeds, bits=st.integers(2, 8))
def test_values_are_those_of_the_primitive(seed: int, bits: int) -> None:
    torch.manual_seed(seed)
    quantizer = per_tensor(scale=float(torch.rand(()) + 0.01), zero_point=2 ** (bits - 1) - 1, bits=bits)
    x = away_from_ties(torch.randn(5, 7) * 3, quantizer.scale)
    expected = fake_quantize(x, quantizer.scale, quantizer.zero_point, quantizer.quant_min, quantizer.quant_max)
    assert torch.allclose(quantizer(x), expected, rtol=1e-6, atol=0)
    assert torch.equal(quantizer(quantizer(x)), quantizer(x))
    assert quantizer.num_bits == bits


@given(seed=seeds, bits=st.integers(2, 8))
def test_a_signed_grid_gives_values_and_gradients_of_the_unsigned_one(seed: int, bits: int) -> None:
    torch.manual_seed(seed)
    scale, zero_point, shift = float(torch.rand(()) + 0.01), int(torch.randint(0, 2**bits, ())), 2 ** (bits - 1)
    unsigned = per_tensor(scale, zero_point, bits)
    signed = LearnableFakeQuantize(dtype=torch.qint8, quant_min=-shift, quant_max=shift - 1)
    ready(signed, torch.tensor([scale]), torch.tensor([zero_point - shift]))
    x, upstream = torch.randn(40, 7) * 3, torch.randn(40, 7)
    found = []
    for quantizer in (unsigned, signed):
        given = x.clone().requires_grad_()
        quantizer.log_scale.requires_grad_(True)
        hat = quantizer(given)
        hat.backward(upstream)
        found.append((hat.detach(), given.grad, quantizer.log_scale.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@given(seed=seeds, ch_axis=st.integers(0, 3))
def test_values_per_channel_are_those_of_the_primitive(seed: int, ch_axis: int) -> None:
    torch.manual_seed(seed)
    shape = (4, 3, 5, 2)
    quantizer = per_channel(shape[ch_axis], ch_axis)
    along = [1] * 4
    along[ch_axis] = -1
    x = away_from_ties(torch.randn(shape), quantizer.scale.reshape(along))
    bounds = (quantizer.quant_min, quantizer.quant_max)
    expected = fake_quantize(x, quantizer.scale, quantizer.zero_point, *bounds, ch_axis)
    assert torch.allclose(quantizer(x), expected, rtol=1e-6, atol=0)


@given(seed=seeds)
def test_gradients_per_tensor_are_those_of_lsq(seed: int) -> None:
    torch.manual_seed(seed)
    quantizer = per_tensor()
    scale = quantizer.scale.detach()
    x = away_from_ties(torch.randn(200) * 3, scale).requires_grad_()
    upstream = torch.randn(200)
    (quantizer(x) * upstream).sum().backward()
    codes = torch.round(x.detach() / scale) + 3
    assert torch.equal(x.grad, torch.where((codes >= 0) & (codes <= 15), upstream, 0.0))
    expected = lsq_gradient(x.detach(), upstream, scale, torch.tensor(3), (0, 15)).sum() * scale
    assert torch.allclose(quantizer.log_scale.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shape", "ch_axis"), [((1, 3, 3, 3), 0), ((4, 1, 2), 1), ((1, 5), 0), ((1,), 0)])
def test_gradients_of_the_only_channel_are_those_per_tensor(shape: tuple[int, ...], ch_axis: int) -> None:
    one, other = per_channel(1, ch_axis), per_channel(1, ch_axis)
    together = ready(LearnableFakeQuantize(quant_min=-7, quant_max=7), one.scale.detach(), torch.zeros(1).long())
    other.load_state_dict(one.state_dict())
    x = torch.randn(shape)
    gradients = []
    for quantizer in (other, together):
        values = x.clone().requires_grad_()
        (quantizer(values) * torch.linspace(-1, 1, x.numel()).reshape(shape)).sum().backward()
        gradients.append((values.grad, quantizer.log_scale.grad))
    assert all(torch.equal(a, b) and a.shape == b.shape for a, b in zip(*gradients, strict=True))


@given(seed=seeds, ch_axis=st.integers(0, 2))
def test_gradients_per_channel_are_those_of_lsq(seed: int, ch_axis: int) -> None:
    torch.manual_seed(seed)
    shape = (4, 3, 5)
    quantizer = per_channel(shape[ch_axis], ch_axis)
    along = [1] * 3
    along[ch_axis] = -1
    scale = quantizer.scale.detach().reshape(along)
    x = away_from_ties(torch.randn(shape), scale).requires_grad_()
    upstream = torch.randn(shape)
    (quantizer(x) * upstream).sum().backward()
    assert torch.equal(x.grad, torch.where(torch.round(x.detach() / scale).abs() <= 7, upstream, 0.0))
    others = [axis for axis in range(3) if axis != ch_axis]
    gradient = lsq_gradient(x.detach(), upstream, scale, torch.zeros(()), (-7, 7)).sum(others)
    assert torch.allclose(quantizer.log_scale.grad, gradient * scale.flatten(), rtol=1e-4, atol=1e-5)


def test_what_is_clipped_moves_the_scale_as_a_finite_difference_says() -> None:
    quantizer = per_tensor()
    x = torch.tensor([100.0, -100.0, 50.0])
    quantizer(x).sum().backward()
    values, step = [], 1e-3
    for sign in (1, -1):
        moved = copy.deepcopy(quantizer)
        moved.log_scale.data += sign * step
        values.append(moved(x).sum().item())
    assert quantizer.log_scale.grad.item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-3)


def test_learning_the_scale_improves_on_a_range_stretched_by_an_outlier() -> None:
    x = torch.randn(2000)
    x[0] = 40.0
    quantizer = LearnableFakeQuantize(quant_min=0, quant_max=15)
    quantizer(x)
    quantizer.enable_observer(False)
    optimizer = torch.optim.Adam([quantizer.log_scale], lr=0.02)
    losses = []
    for _ in range(100):
        loss = (quantizer(x) - x).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("direction", [1.0, -1.0])
@pytest.mark.parametrize("learning_rate", [0.1, 10.0, 1000.0])
def test_no_step_makes_a_scale_zero_negative_or_infinite(direction: float, learning_rate: float) -> None:
    quantizer = per_channel(3, 0)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=learning_rate)
    for _ in range(50):
        optimizer.zero_grad()
        (quantizer.scale.log() * direction + quantizer.log_scale * direction).sum().backward()
        optimizer.step()
        assert (quantizer.scale > 0).all() and quantizer.scale.isfinite().all()
        assert quantizer(torch.randn(3, 4)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [per_tensor, partial(per_channel, 3, 1)])
def test_other_dtypes_come_back_and_have_gradients(
    dtype: torch.dtype, make: Callable[[], LearnableFakeQuantize]
) -> None:
    quantizer = make()
    x = torch.randn(4, 3).to(dtype)
    learning = x.clone().requires_grad_()
    hat = quantizer(learning)
    assert hat.dtype == dtype
    assert torch.equal(hat, quantizer(x.float()).to(dtype))
    hat.sum().backward()
    assert learning.grad.dtype == dtype and learning.grad.abs().sum() > 0
    assert quantizer.log_scale.grad.abs().sum() > 0


def test_an_empty_tensor_passes() -> None:
    for quantizer in (per_tensor(), LearnableFakeQuantize()):
        assert quantizer(torch.empty(0, 3)).shape == (0, 3)


# Observing, dropping, state


@pytest.mark.parametrize("observer", [MinMaxObserver, MAEObserver, MSEObserver, PercentileObserver])
def test_while_observing_the_scale_is_the_observers(observer: type[RangeObserver]) -> None:
    quantizer = LearnableFakeQuantize(observer=observer, quant_min=0, quant_max=31)
    reference = observer(quant_min=0, quant_max=31)
    for _ in range(3):
        x = torch.randn(20)
        quantizer(x)
        reference(x)
    scale, zero_point = quantizer.calculate_qparams()
    expected, expected_zero = reference.calculate_qparams()
    assert torch.allclose(scale, expected, rtol=1e-6) and torch.equal(zero_point, expected_zero)
    quantizer.enable_observer(False)
    quantizer(torch.randn(20) * 1000)
    assert torch.equal(quantizer.calculate_qparams()[0], scale)


def test_switches() -> None:
    quantizer = per_tensor()
    x = torch.randn(10)
    quantizer.disable_fake_quant()
    assert quantizer(x) is x
    quantizer.enable_fake_quant()
    assert not torch.equal(quantizer(x), x)
    assert (int(quantizer.observer_enabled), int(quantizer.fake_quant_enabled)) == (0, 1)
    with pytest.raises(CalibrationError, match="1 of 2"):
        LearnableFakeQuantize()(torch.tensor([1.0, float("nan")]))


def test_dropping_leaves_its_share_unquantized_and_only_in_training() -> None:
    quantizer = LearnableFakeQuantize(quant_min=0, quant_max=3, drop_probability=0.3)
    ready(quantizer, torch.tensor([0.7]), torch.tensor([1]))
    x = torch.rand(20_000) + 0.01
    hat = quantizer.eval()(x)
    mixed = quantizer.train()(x)
    kept = mixed == x
    assert 0.28 < kept.float().mean() < 0.32
    assert torch.equal(mixed[~kept], hat[~kept])
    assert not torch.equal(quantizer(x), mixed)  # drawn anew
    assert not (hat == x).any()


@pytest.mark.parametrize("probability", [-0.1, 1.5, float("nan")])
def test_a_probability_out_of_range_is_refused(probability: float) -> None:
    with pytest.raises(ConfigError, match="drop_probability"):
        LearnableFakeQuantize(drop_probability=probability)


def test_a_foreign_observer_or_a_wrong_scheme_is_refused() -> None:
    with pytest.raises(ConfigError, match="repapq_plugin.observers"):
        LearnableFakeQuantize(observer=TorchMinMaxObserver)
    with pytest.raises(ConfigError, match="qscheme"):
        PerChannelLearnableFakeQuantize(observer=MinMaxObserver)
    with pytest.raises(ConfigError, match="is_dynamic"):
        LearnableFakeQuantize(is_dynamic=True)


def test_one_scale_for_every_channel_never_comes_from_a_per_channel_observer() -> None:
    quantizer = LearnableFakeQuantize(observer=PerChannelMinMaxObserver, dtype=torch.qint8)
    weight = torch.randn(3, 8) * torch.tensor([[0.01], [1.0], [100.0]])
    step = quantizer.activation_post_process.max_val.new_tensor([0.01, 1.0, 100.0]) * 8 / 255
    assert ((quantizer(weight) - weight).abs().amax(1) < step).all()


@pytest.mark.parametrize("copied", ["state", "deepcopy", "pickle"])
def test_learned_state_survives(copied: str) -> None:
    quantizer = per_channel(5, 1)
    x = torch.randn(4, 5)
    if copied == "state":
        other: LearnableFakeQuantize = PerChannelLearnableFakeQuantize(quant_min=-7, quant_max=7, ch_axis=1)
        assert other.load_state_dict(quantizer.state_dict()) == ([], [])
    else:
        other = copy.deepcopy(quantizer) if copied == "deepcopy" else pickle.loads(pickle.dumps(quantizer))
    assert torch.equal(other(x), quantizer(x))
    assert not other.observing and other.quantizing
    assert other.log_scale.shape == (5,) and other.log_scale.requires_grad
    other(x).sum().backward()
    assert other.log_scale.grad is not None and quantizer.log_scale.grad is None


def test_state_of_an_affine_quantizer_survives_inside_a_network() -> None:
    net = nn.Sequential(LearnableFakeQuantize(observer=MAEObserver), nn.Linear(3, 2))
    net(torch.randn(8, 3) + 5)
    twin = nn.Sequential(LearnableFakeQuantize(observer=MAEObserver), nn.Linear(3, 2))
    twin.load_state_dict(net.state_dict())
    for each in (net, twin):
        each(torch.randn(8, 3, generator=torch.Generator().manual_seed(1)) * 9)
    assert all(map(torch.equal, net[0].calculate_qparams(), twin[0].calculate_qparams()))


def test_a_missing_key_is_reported() -> None:
    state = per_channel(5, 1).state_dict()
    del state["log_scale"]
    with pytest.raises(RuntimeError, match="log_scale"):
        PerChannelLearnableFakeQuantize().load_state_dict(state)


def test_setting_qparams_keeps_the_parameter_that_an_optimizer_holds() -> None:
    quantizer = per_channel(3, 0)
    held = quantizer.log_scale
    quantizer.set_qparams(torch.tensor([1e-3, 1.0, 1e3]), torch.zeros(3))
    assert quantizer.log_scale is held
    assert quantizer.scale.tolist() == pytest.approx([1e-3, 1.0, 1e3])
    assert quantizer.zero_point.dtype == torch.int64
