"""Laws of the uniform quantizer, worked examples, and agreement with torch's own kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from repapq_plugin.core.quant_primitives import (
    EPS,
    activation_bounds,
    choose_qparams,
    dequantize,
    fake_quantize,
    quantize,
    weight_bounds,
)

BITS = range(2, 9)
GRIDS = [(activation_bounds(bits), False) for bits in BITS] + [(weight_bounds(bits), True) for bits in BITS]

reals = st.floats(-1e4, 1e4, width=32)
vectors = st.lists(reals, min_size=1, max_size=40).map(torch.tensor)
grids = st.sampled_from(GRIDS)
# A float32 quotient of up to 255 steps is off by this share of a step at most.
ROUNDING = 1e-4


def qparams_of(x: Tensor, grid: tuple[tuple[int, int], bool]) -> tuple[Tensor, Tensor, int, int]:
    (quant_min, quant_max), symmetric = grid
    scale, zero_point = choose_qparams(x.min(), x.max(), quant_min, quant_max, symmetric=symmetric)
    return scale, zero_point, quant_min, quant_max


def far_from_ties(x: Tensor, scale: Tensor) -> Tensor:
    """Where two ways to divide round to the same integer: not within float32's error of a half."""
    steps = x.double() / scale.double()
    return ((steps - steps.floor()) - 0.5).abs() > 1e-6 * steps.abs().clamp(min=1)


@pytest.mark.parametrize("bits", BITS)
def test_bounds_hold_as_many_integers_as_the_bits_allow(bits: int) -> None:
    low, high = activation_bounds(bits)
    assert (low, high - low + 1) == (0, 2**bits)
    low, high = weight_bounds(bits)
    assert (low + high, high - low + 1) == (0, 2**bits - 1)


@given(vectors, grids)
def test_codes_are_integers_within_the_bounds(x: Tensor, grid: tuple[tuple[int, int], bool]) -> None:
    scale, zero_point, quant_min, quant_max = qparams_of(x, grid)
    far = torch.cat([x, x * 10, torch.tensor([1e30, -1e30])])
    codes = quantize(far, scale, zero_point, quant_min, quant_max)
    assert codes.dtype == torch.int32
    assert codes.min() >= quant_min and codes.max() <= quant_max
    assert zero_point.dtype == torch.int64 and quant_min <= int(zero_point) <= quant_max


@given(reals, reals, grids)
def test_zero_is_exact(a: float, b: float, grid: tuple[tuple[int, int], bool]) -> None:
    scale, zero_point, quant_min, quant_max = qparams_of(torch.tensor([a, b]), grid)
    zero = torch.zeros(1)
    assert quantize(zero, scale, zero_point, quant_min, quant_max).item() == zero_point.item()
    assert fake_quantize(zero, scale, zero_point, quant_min, quant_max).item() == 0.0


@given(vectors, grids)
def test_quantizing_twice_is_quantizing_once(x: Tensor, grid: tuple[tuple[int, int], bool]) -> None:
    qparams = qparams_of(x, grid)
    once = fake_quantize(x, *qparams)
    assert torch.equal(fake_quantize(once, *qparams), once)


@given(vectors, grids)
def test_codes_survive_the_way_to_real_values_and_back(x: Tensor, grid: tuple[tuple[int, int], bool]) -> None:
    scale, zero_point, quant_min, quant_max = qparams_of(x, grid)
    codes = torch.arange(quant_min, quant_max + 1, dtype=torch.int32)
    assert torch.equal(quantize(dequantize(codes, scale, zero_point), scale, zero_point, quant_min, quant_max), codes)


@given(vectors, grids)
def test_inside_the_range_the_error_is_at_most_half_a_step(x: Tensor, grid: tuple[tuple[int, int], bool]) -> None:
    qparams = qparams_of(x, grid)
    error = (fake_quantize(x, *qparams) - x).abs().max()
    assert error <= qparams[0] * (0.5 + ROUNDING)


@given(vectors, grids, st.floats(0.1, 1.0))
def test_order_is_kept(x: Tensor, grid: tuple[tuple[int, int], bool], narrower: float) -> None:
    ordered = x.sort().values
    hat = fake_quantize(ordered, *qparams_of(x * narrower, grid))
    assert (hat.diff() >= 0).all()


@given(vectors, st.sampled_from(BITS))
def test_the_narrow_symmetric_grid_mirrors(x: Tensor, bits: int) -> None:
    qparams = qparams_of(x, (weight_bounds(bits), True))
    assert qparams[1].item() == 0
    assert torch.equal(fake_quantize(-x, *qparams), -fake_quantize(x, *qparams))


@given(vectors, grids)
def test_the_whole_grid_is_used(x: Tensor, grid: tuple[tuple[int, int], bool]) -> None:
    scale, zero_point, quant_min, quant_max = qparams_of(x, grid)
    low, high = ((bound - zero_point) * scale for bound in (quant_min, quant_max))
    sweep = torch.linspace(float(low), float(high), 4 * 256)
    used = quantize(sweep, scale, zero_point, quant_min, quant_max).unique()
    assert used.tolist() == list(range(quant_min, quant_max + 1))


@given(vectors, grids, st.floats(0.05, 1.0))
def test_agrees_with_torch_per_tensor(x: Tensor, grid: tuple[tuple[int, int], bool], narrower: float) -> None:
    scale, zero_point, quant_min, quant_max = qparams_of(x * narrower, grid)
    theirs = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), quant_min, quant_max)
    ours = fake_quantize(x, scale, zero_point, quant_min, quant_max)
    # torch multiplies by the inverse; where that lands on the other side of a half, one step is right too.
    same = far_from_ties(x, scale)
    assert torch.allclose(ours[same], theirs[same], rtol=1e-6, atol=0)
    assert ((ours - theirs).abs() <= scale * (1 + ROUNDING)).all()


@given(st.integers(0, 2**32 - 1), grids, st.integers(0, 3))
def test_agrees_with_torch_per_channel(seed: int, grid: tuple[tuple[int, int], bool], ch_axis: int) -> None:
    (quant_min, quant_max), symmetric = grid
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, 2, 5, generator=generator) * torch.logspace(-3, 3, 5)
    rows = x.movedim(ch_axis, 0).flatten(1)
    scale, zero_point = choose_qparams(rows.amin(1), rows.amax(1), quant_min, quant_max, symmetric=symmetric)
    theirs = torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), ch_axis, quant_min, quant_max)
    ours = fake_quantize(x, scale, zero_point, quant_min, quant_max, ch_axis)
    by_channel = [
        fake_quantize(part, scale[i], zero_point[i], quant_min, quant_max) for i, part in enumerate(x.unbind(ch_axis))
    ]
    assert torch.equal(ours, torch.stack(by_channel, ch_axis))
    shape = [1] * 4
    shape[ch_axis] = -1
    same = far_from_ties(x, scale.reshape(shape))
    assert torch.allclose(ours[same], theirs[same], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fake_quantize_keeps_the_dtype(dtype: torch.dtype) -> None:
    x = torch.linspace(-2, 2, 9).to(dtype)
    hat = fake_quantize(x, torch.tensor(0.5), torch.tensor(4), 0, 7)
    assert hat.dtype == dtype
    assert hat.tolist() == [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 1.5]


def test_two_bits_by_hand() -> None:
    scale, zero_point = choose_qparams(torch.tensor(-1.0), torch.tensor(3.0), 0, 3, symmetric=False)
    assert (scale.item(), zero_point.item()) == (pytest.approx(4 / 3), 1)
    codes = quantize(torch.tensor([-9.0, -1.0, 0.0, 1.0, 1.9, 3.0, 9.0]), scale, zero_point, 0, 3)
    assert codes.tolist() == [0, 0, 1, 2, 2, 3, 3]


def test_halves_go_to_the_even_neighbour() -> None:
    codes = quantize(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), torch.tensor(1.0), torch.tensor(0), -7, 7)
    assert codes.tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize(("low", "high"), [(2.0, 6.0), (-6.0, -2.0)])
def test_a_range_beside_zero_is_widened_to_hold_it(low: float, high: float) -> None:
    scale, zero_point = choose_qparams(torch.tensor(low), torch.tensor(high), 0, 15, symmetric=False)
    assert scale.item() == pytest.approx(6 / 15)
    assert zero_point.item() == (0 if low > 0 else 15)


def test_a_range_without_width_has_the_smallest_scale() -> None:
    for symmetric in (False, True):
        scale, _ = choose_qparams(torch.zeros(3), torch.zeros(3), -7, 7, symmetric=symmetric)
        assert scale.tolist() == [EPS] * 3


def test_the_unsigned_symmetric_grid_centres_on_its_middle() -> None:
    _, zero_point = choose_qparams(torch.tensor(-1.0), torch.tensor(0.5), 0, 255, symmetric=True)
    assert zero_point.item() == 128
