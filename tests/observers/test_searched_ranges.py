"""Ranges found by search: never worse than min-max, near the best there is, and what outliers do to each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from repapq_plugin.core.quant_primitives import activation_bounds, choose_qparams, fake_quantize, weight_bounds
from repapq_plugin.observers import (
    MAEObserver,
    MinMaxObserver,
    MSEObserver,
    PercentileObserver,
    PerChannelMinMaxObserver,
    PerChannelMSEObserver,
    SearchedRangeObserver,
)

seeds = st.integers(0, 2**32 - 1)
bit_widths = st.integers(2, 8)
POWERS = {MAEObserver: 1.0, MSEObserver: 2.0}
searched = pytest.mark.parametrize("cls", list(POWERS))


def heavy_tailed(seed: int, shape: tuple[int, ...] = (3000,)) -> Tensor:
    """Activations as networks make them: a shifted bulk with a long tail."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    tail = torch.randn(shape, generator=generator).abs() ** 3
    return x + tail * float(torch.rand((), generator=generator)) + float(torch.randn((), generator=generator))


def error(x: Tensor, power: float, qparams: tuple[Tensor, Tensor], bounds: tuple[int, int]) -> float:
    """The ``power``-norm mean of the error, in the unit of ``x``."""
    hat = fake_quantize(x.double(), qparams[0].double(), qparams[1], *bounds)
    return float((hat - x.double()).abs().pow(power).mean() ** (1 / power))


@searched
@given(deviation=st.floats(-1e6, 1e6))
def test_an_error_is_measured_by_its_power(cls: type[SearchedRangeObserver], deviation: float) -> None:
    measured = cls().measure(torch.tensor([deviation], dtype=torch.float64))
    assert measured.tolist() == [abs(deviation) ** POWERS[cls]]


@searched
@given(seed=seeds, bits=bit_widths)
def test_on_its_histogram_never_worse_than_min_max(cls: type[SearchedRangeObserver], seed: int, bits: int) -> None:
    low, high = activation_bounds(bits)
    observer = cls(quant_min=low, quant_max=high)
    observer(heavy_tailed(seed))
    found = [bound[None] for bound in observer.find_range()]
    full = [observer.min_val.clamp(max=0)[None], observer.max_val.clamp(min=0)[None]]
    assert observer.range_error(*found) <= observer.range_error(*full)
    assert full[0] <= found[0] and found[1] <= full[1]


@searched
@pytest.mark.parametrize("symmetric", [pytest.param(False, marks=pytest.mark.slow), True])
@given(seed=seeds, bits=bit_widths)
def test_on_the_data_never_worse_than_min_max_by_more_than_bins(
    cls: type[SearchedRangeObserver], symmetric: bool, seed: int, bits: int
) -> None:
    bounds = weight_bounds(bits) if symmetric else activation_bounds(bits)
    scheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    kwargs = {"qscheme": scheme, "quant_min": bounds[0], "quant_max": bounds[1], "dtype": torch.qint8}
    observer, reference = cls(**kwargs), MinMaxObserver(**kwargs)
    x = heavy_tailed(seed)
    for part in x.split(1000):
        observer(part)
        reference(part)
    # The error of a value and that of its bin's representative differ by their distance at most.
    bin_width = 2 * float(observer.radius) / observer.bins
    found = error(x, POWERS[cls], observer.calculate_qparams(), bounds)
    assert found <= error(x, POWERS[cls], reference.calculate_qparams(), bounds) + 2 * bin_width


@pytest.mark.slow
@searched
@given(seed=seeds, bits=st.integers(2, 5))
def test_behind_a_relu_it_is_the_best_of_all_candidates(cls: type[SearchedRangeObserver], seed: int, bits: int) -> None:
    bounds = activation_bounds(bits)
    observer = cls(quant_min=bounds[0], quant_max=bounds[1])
    x = torch.relu(heavy_tailed(seed))
    observer(x)
    candidates = torch.linspace(0.01, 1, 100) * x.max()
    ranges = [choose_qparams(torch.zeros(()), high, *bounds, symmetric=False) for high in candidates]
    best = min(error(x, POWERS[cls], qparams, bounds) for qparams in ranges)
    bin_width = 2 * float(observer.radius) / observer.bins
    assert error(x, POWERS[cls], observer.calculate_qparams(), bounds) <= best + 2 * bin_width


@searched
@given(seed=seeds, bits=bit_widths, outlier=st.floats(20, 5000))
def test_behind_an_outlier_of_any_size_the_search_stays_fine(
    cls: type[SearchedRangeObserver], seed: int, bits: int, outlier: float
) -> None:
    bounds = activation_bounds(bits)
    observer = cls(quant_min=bounds[0], quant_max=bounds[1])
    x = torch.relu(torch.randn(5000, generator=torch.Generator().manual_seed(seed)))
    x[7] = outlier
    observer(x)
    dense = torch.logspace(-4, 0, 300) * outlier
    best = observer.range_error(torch.zeros(300), dense).min()
    low, high = observer.find_range()
    assert observer.range_error(low[None], high[None]) <= 1.1 * best


@given(seed=seeds, bits=bit_widths, outlier=st.floats(15, 1000))
def test_an_outlier_stretches_mae_at_most_as_far_as_mse(seed: int, bits: int, outlier: float) -> None:
    bounds = activation_bounds(bits)
    x = torch.relu(torch.randn(5000, generator=torch.Generator().manual_seed(seed)))
    x[7] = outlier
    upper = {}
    for cls in (MAEObserver, MSEObserver, MinMaxObserver):
        observer = cls(quant_min=bounds[0], quant_max=bounds[1])
        observer(x)
        upper[cls] = observer.find_range()[1].item()
    assert upper[MAEObserver] <= upper[MSEObserver] <= upper[MinMaxObserver] == pytest.approx(outlier)


def test_at_eight_bits_mae_cuts_an_outlier_that_mse_keeps() -> None:
    x = torch.relu(torch.randn(100_000))
    x[7] = 100.0
    mae, mse = MAEObserver(), MSEObserver()
    mae(x)
    mse(x)
    bulk = x.sort().values[-2].item()
    assert mae.find_range()[1].item() < 2 * bulk < 20 < mse.find_range()[1].item()


@pytest.mark.parametrize("cls", [MAEObserver, MSEObserver])
def test_one_loud_sample_does_not_stretch_the_range_of_all(cls: type[MAEObserver | MSEObserver]) -> None:
    torch.manual_seed(0)
    images = torch.rand(16, 3, 8, 8)
    with_a_loud_one = images * torch.tensor([100.0, *[1.0] * 15]).reshape(-1, 1, 1, 1)
    highs = []
    for x in (images, with_a_loud_one):
        observer = cls(quant_min=0, quant_max=15)
        observer(x)
        highs.append(observer.find_range()[1].item())
    assert highs[1] < 2 * highs[0]


def test_two_bits_by_hand() -> None:
    # Values 0, 1, 2, 3 a hundred times each, and a 30. Step 1 leaves an error at the 30 alone: 27. MSE
    # trades: step 2.8 costs the bulk 100 * (1^2 + .8^2 + .2^2) = 168 and saves 27^2 - 21.6^2 = 262.
    x = torch.cat([torch.arange(4.0).repeat(100), torch.tensor([30.0])])
    mae, mse = (cls(quant_min=0, quant_max=3) for cls in (MAEObserver, MSEObserver))
    mae(x)
    mse(x)
    assert [bound.item() for bound in mae.find_range()] == [0.0, pytest.approx(3.0)]
    assert [bound.item() for bound in mse.find_range()] == [0.0, pytest.approx(8.4)]
    scale, zero_point = mae.calculate_qparams()
    assert (scale.item(), zero_point.item()) == (pytest.approx(1.0), 0)
    found = torch.tensor([3.0])
    assert mae.range_error(torch.zeros(1), found).item() == pytest.approx(27 / 401)
    assert mse.range_error(torch.zeros(1), found).item() == pytest.approx(27**2 / 401)


def test_both_ends_are_searched() -> None:
    x = torch.cat([torch.randn(10_000), torch.tensor([-80.0, 60.0])])
    observer = MAEObserver()
    observer(x)
    low, high = (bound.item() for bound in observer.find_range())
    assert -6 < low < -2.5 and 2.5 < high < 6


@given(seed=seeds, bits=bit_widths, ch_axis=st.integers(0, 1), affine=st.booleans())
def test_per_channel_mse_is_never_worse_than_min_max_in_any_channel(
    seed: int, bits: int, ch_axis: int, affine: bool
) -> None:
    bounds = weight_bounds(bits)
    kwargs = {
        "qscheme": torch.per_channel_affine if affine else torch.per_channel_symmetric,
        "quant_min": bounds[0],
        "quant_max": bounds[1],
        "ch_axis": ch_axis,
    }
    weight = heavy_tailed(seed, (6, 5, 3, 3))
    errors = []
    for cls in (PerChannelMSEObserver, PerChannelMinMaxObserver):
        observer = cls(**kwargs)
        observer(weight)
        hat = fake_quantize(weight, *observer.calculate_qparams(), *bounds, ch_axis)
        errors.append((hat - weight).square().movedim(ch_axis, 0).flatten(1).mean(1))
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all()


def test_per_channel_mse_cuts_only_where_it_pays() -> None:
    even = torch.linspace(-1, 1, 400)
    spiky = torch.cat([torch.linspace(-0.1, 0.1, 399), torch.ones(1)])
    observer = PerChannelMSEObserver(qscheme=torch.per_channel_symmetric, quant_min=-3, quant_max=3)
    observer(torch.stack([even, spiky]))
    high = observer.find_range()[1]
    assert high[0] > 0.85
    assert high[1] < 0.75


@given(seed=seeds, percentile=st.floats(50, 100))
def test_a_percentile_cuts_its_share_off_both_ends(seed: int, percentile: float) -> None:
    observer = PercentileObserver(percentile=percentile)
    x = heavy_tailed(seed)
    for part in x.split(500):
        observer(part)
    low, high = observer.find_range()
    outside = 1 - percentile / 100
    bin_width = 2 * float(observer.radius) / observer.bins
    expected = torch.quantile(x, torch.tensor([outside, 1 - outside]), interpolation="lower")
    # Which of two neighbours a quantile is depends on rounding of the share: both are allowed.
    ordered = x.sort().values
    for bound, quantile in ((low, expected[0]), (high, expected[1])):
        position = int(torch.searchsorted(ordered, quantile))
        near = ordered[max(position - 1, 0) : position + 3]
        assert near.min() - bin_width <= bound <= near.max() + bin_width
    assert x.min() <= low and high <= x.max()


def test_percentiles_by_hand() -> None:
    x = torch.arange(-100.0, 101.0)
    ranges = {}
    for percentile in (100.0, 90.0, 50.0):
        observer = PercentileObserver(percentile=percentile, bins=1024)
        observer(x)
        ranges[percentile] = [bound.item() for bound in observer.find_range()]
    assert ranges == {100.0: [-100.0, 100.0], 90.0: [-80.0, 80.0], 50.0: [0.0, 0.0]}
