"""What every observer must do, whatever its idea of a good range."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from repapq_plugin.config import OBSERVER_NAMES, WEIGHT_OBSERVER_NAMES, RepAPQConfig
from repapq_plugin.core.quant_primitives import EPS, activation_bounds, fake_quantize, weight_bounds
from repapq_plugin.errors import CalibrationError, ConfigError
from repapq_plugin.observers import (
    OBSERVERS,
    HistogramRangeObserver,
    MAEObserver,
    MinMaxObserver,
    MSEObserver,
    PercentileObserver,
    PerChannelMinMaxObserver,
    PerChannelMSEObserver,
    RangeObserver,
    register_observer,
)

Factory = Callable[..., RangeObserver]
PER_TENSOR = [MinMaxObserver, MSEObserver, MAEObserver, PercentileObserver]
PER_CHANNEL = [PerChannelMinMaxObserver, PerChannelMSEObserver]
HISTOGRAMS = [MSEObserver, MAEObserver, PercentileObserver]

per_tensor = pytest.mark.parametrize("cls", PER_TENSOR)
per_channel = pytest.mark.parametrize("cls", PER_CHANNEL)
histograms = pytest.mark.parametrize("cls", HISTOGRAMS)
every = pytest.mark.parametrize("cls", PER_TENSOR + PER_CHANNEL)

seeds = st.integers(0, 2**32 - 1)
bit_widths = st.integers(2, 8)


def made(cls: Factory, bits: int = 8, **kwargs: object) -> RangeObserver:
    """An observer as the calibration makes it: unsigned per tensor, narrow and signed per channel."""
    if cls in PER_CHANNEL:
        low, high = weight_bounds(bits)
        return cls(dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=low, quant_max=high, **kwargs)
    low, high = activation_bounds(bits)
    return cls(quant_min=low, quant_max=high, **kwargs)


def quantized(observer: RangeObserver, x: Tensor) -> Tensor:
    axis = observer.ch_axis if observer.per_channel else None
    return fake_quantize(x, *observer.calculate_qparams(), observer.quant_min, observer.quant_max, axis)


def batches(seed: int, count: int = 5) -> list[Tensor]:
    """Batches of very different magnitudes and signs."""
    generator = torch.Generator().manual_seed(seed)
    magnitudes = 10.0 ** torch.randint(-4, 4, (count,), generator=generator)
    shifts = torch.randn(count, generator=generator)
    return [(torch.randn(4, 50, generator=generator) + b) * a for a, b in zip(magnitudes, shifts, strict=True)]


def test_configurations_name_registered_observers() -> None:
    names = set(OBSERVER_NAMES)
    weights = {f"per_channel_{name}" for name in WEIGHT_OBSERVER_NAMES}
    assert names | weights == set(OBSERVERS)
    assert all(OBSERVERS[name].per_channel == name.startswith("per_channel_") for name in OBSERVERS)


def test_a_foreign_observer_is_registered_by_its_decorator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repapq_plugin.observers.base.OBSERVERS", registry := {})
    monkeypatch.setattr("repapq_plugin.observers.base.OBSERVER_NAMES", [])

    @register_observer("twice_min_max")
    class TwiceMinMax(MinMaxObserver):
        def find_range(self) -> tuple[Tensor, Tensor]:
            return 2 * self.min_val, 2 * self.max_val

    assert registry == {"twice_min_max": TwiceMinMax}
    wide, plain = TwiceMinMax(), MinMaxObserver()
    x = torch.tensor([-1.0, 3.0])
    assert torch.equal(wide(x), x) and torch.equal(plain(x), x)
    assert wide.calculate_qparams()[0] == 2 * plain.calculate_qparams()[0]


@every
def test_answers_before_anything_was_seen(cls: Factory) -> None:
    observer = made(cls)
    observer(torch.empty(0, 4))
    scale, zero_point = observer.calculate_qparams()
    assert (scale.tolist(), zero_point.tolist()) == ([1.0], [0])


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_refuses_what_is_not_finite_and_stays_as_it_was(cls: Factory, bad: float) -> None:
    observer = made(cls)
    good = torch.randn(3, 7)
    observer(good)
    before = pickle.dumps(observer.state_dict())
    broken = good.clone()
    broken[1, 2:4] = bad
    with pytest.raises(CalibrationError, match="2 of 21 observed values are NaN or Inf"):
        observer(broken)
    assert pickle.dumps(observer.state_dict()) == before


@per_tensor
@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-3, 1e30, -1e30])
def test_a_constant_tensor_comes_back(cls: Factory, value: float) -> None:
    observer = made(cls)
    for _ in range(3):
        observer(torch.full((2, 3), value))
    hat = quantized(observer, torch.tensor([0.0, value]))
    assert hat[0] == 0
    assert hat[1].item() == pytest.approx(value, rel=1e-5)


@per_tensor
@pytest.mark.parametrize("magnitude", [1e-38, 1e-20, 1e-8])
def test_below_the_smallest_scale_nothing_breaks(cls: Factory, magnitude: float) -> None:
    observer = made(cls)
    x = torch.linspace(-1, 1, 101) * magnitude
    observer(x)
    assert observer.calculate_qparams()[0].item() == pytest.approx(EPS)
    assert (quantized(observer, x) - x).abs().max() <= EPS / 2 + magnitude


@per_tensor
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e6, 1e30])
def test_ranges_follow_the_magnitude(cls: Factory, magnitude: float) -> None:
    x = torch.randn(2000)
    plain, scaled = made(cls), made(cls)
    plain(x)
    scaled(x * magnitude)
    expected = plain.calculate_qparams()[0] * magnitude
    # The histogram's bins are those of the next power of two: a little other with every magnitude.
    assert scaled.calculate_qparams()[0].item() == pytest.approx(expected.item(), rel=0.05)


@per_tensor
def test_zeros_first_do_not_spoil_what_follows(cls: Factory) -> None:
    x = torch.randn(500)
    late, early = made(cls), made(cls)
    for part in (torch.zeros(500), x):
        late(part)
    for part in (x, torch.zeros(500)):
        early(part)
    assert torch.allclose(late.calculate_qparams()[0], early.calculate_qparams()[0], rtol=1e-6)
    assert late.calculate_qparams()[0].item() > EPS


@pytest.mark.slow
@histograms
@given(seed=seeds, exponent=st.integers(-30, 30))
def test_the_histogram_is_the_same_whether_zeros_come_first_or_last(
    cls: type[HistogramRangeObserver], seed: int, exponent: int
) -> None:
    x = torch.randn(300, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    late, early = made(cls), made(cls)
    for part in (torch.zeros(100), x):
        late(part)
    for part in (x, torch.zeros(100)):
        early(part)
    assert torch.equal(late.radius, early.radius) and torch.equal(late.counts, early.counts)


@pytest.mark.parametrize("cls", [MinMaxObserver, PerChannelMinMaxObserver])
@given(seed=seeds)
def test_min_max_of_a_stream_is_that_of_all_at_once(cls: Factory, seed: int) -> None:
    parts = batches(seed)
    streamed, whole = made(cls), made(cls)
    for part in parts:
        streamed(part)
    whole(torch.cat(parts, dim=1))
    assert all(map(torch.equal, streamed.calculate_qparams(), whole.calculate_qparams()))


@histograms
@given(seed=seeds, order=st.permutations(range(5)))
def test_the_histogram_of_a_stream_does_not_know_its_order(
    cls: type[HistogramRangeObserver], seed: int, order: list[int]
) -> None:
    parts = batches(seed)
    streamed, whole = made(cls), made(cls)
    for index in order:
        streamed(parts[index])
    # Samples that count alike do so within their batch; where values do, all may come at once.
    for part in [torch.cat(parts)] if cls is PercentileObserver else parts:
        whole(part)
    assert torch.equal(streamed.radius, whole.radius)
    assert torch.equal(streamed.counts, whole.counts)
    assert torch.allclose(streamed.sums, whole.sums, rtol=1e-12, atol=float(whole.radius) * 1e-12)
    assert torch.equal(streamed.min_val, whole.min_val) and torch.equal(streamed.max_val, whole.max_val)


@given(seed=seeds)
def test_the_histogram_counts_every_value_in_its_bin(seed: int) -> None:
    observer = PercentileObserver(bins=64)
    parts = batches(seed)
    for part in parts:
        observer(part)
    values = torch.cat(parts).flatten().double()
    radius = float(observer.radius)
    assert radius / 2 <= values.abs().max() < radius
    edges = torch.linspace(-radius, radius, 65, dtype=torch.float64)
    expected = torch.bucketize(values, edges, right=True) - 1
    assert torch.equal(observer.counts, torch.bincount(expected, minlength=64).double())
    sums = torch.zeros(64, dtype=torch.float64).index_add_(0, expected, values)
    assert torch.allclose(observer.sums, sums, rtol=1e-12, atol=radius * 1e-12)
    points, counts = observer.points()
    assert counts.sum() == values.numel()
    assert (points.diff() > 0).all()


def test_zeros_behind_a_relu_keep_an_exact_representative() -> None:
    observer = MAEObserver()
    for scale in (1.0, 1e3):
        observer(torch.relu(torch.randn(1000)) * scale)
    # The bin beside zero holds values too small to tell apart; with zeros alone it is exactly zero.
    only_zeros = MAEObserver()
    only_zeros(torch.cat([torch.zeros(100), torch.ones(100)]))
    assert only_zeros.points()[0].tolist() == [0.0, 1.0]
    assert observer.points()[0].min() >= 0


@every
def test_memory_does_not_grow(cls: Factory) -> None:
    observer = made(cls)
    sizes = set()
    for step in range(100):
        observer(torch.randn(2, 16) * 1.1**step)
        if step in (0, 1, 50, 99):
            sizes.add(len(pickle.dumps(observer)))
    assert len(sizes) == 1


@every
def test_state_copies_and_pickles_answer_alike_and_go_on_alike(cls: Factory) -> None:
    observer = made(cls, bits=5)
    observer(torch.randn(6, 40))
    loaded = made(cls, bits=5)
    loaded.load_state_dict(observer.state_dict())
    twins = [loaded, copy.deepcopy(observer), pickle.loads(pickle.dumps(observer))]
    for more in (None, torch.randn(6, 40) * 3):
        if more is not None:
            for each in (observer, *twins):
                each(more)
        for twin in twins:
            assert all(map(torch.equal, twin.calculate_qparams(), observer.calculate_qparams()))
    assert observer.calculate_qparams()[0].numel() == (6 if observer.per_channel else 1)


@every
def test_reset_forgets_everything(cls: Factory) -> None:
    used, fresh = made(cls), made(cls)
    used(torch.randn(6, 40) * 100)
    used.reset_min_max_vals()
    assert used.calculate_qparams()[0].tolist() == [1.0]
    x = torch.randn(6, 40)
    used(x)
    fresh(x)
    assert all(map(torch.equal, used.calculate_qparams(), fresh.calculate_qparams()))


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_give_the_same_range(cls: Factory, dtype: torch.dtype) -> None:
    x = torch.randn(6, 40).to(dtype)
    observer, reference = made(cls), made(cls)
    assert observer(x) is x
    reference(x.float())
    assert observer.calculate_qparams()[0].dtype == torch.float32
    assert torch.allclose(observer.calculate_qparams()[0], reference.calculate_qparams()[0], rtol=1e-6)


@every
def test_no_gradient_is_held(cls: Factory) -> None:
    observer = made(cls)
    x = torch.randn(4, 5, requires_grad=True)
    observer(x * 2)
    assert not any(buffer.requires_grad for buffer in observer.buffers())


@every
@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"is_dynamic": True}, "is_dynamic=True"),
        ({"reduce_range": True}, "reduce_range=True.*quant_min and quant_max"),
        ({"quant_min": 3, "quant_max": 3}, "quant_min=3, quant_max=3"),
        ({"quant_min": 1, "quant_max": 15}, "quant_min=1, quant_max=15.*holds 0"),
        ({"quant_min": 5, "quant_max": -5}, "quant_min=5, quant_max=-5"),
        ({"qscheme": torch.per_channel_affine_float_qparams}, "qscheme=torch.per_channel_affine_float_qparams"),
    ],
)
def test_bad_arguments_are_named(cls: Factory, kwargs: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        cls(**kwargs)


@every
def test_the_scheme_must_be_one_for_the_class(cls: type[RangeObserver]) -> None:
    wrong = torch.per_tensor_symmetric if cls.per_channel else torch.per_channel_symmetric
    with pytest.raises(ConfigError, match=f"{wrong} is not allowed for {cls.__name__}; choose torch.per_"):
        cls(qscheme=wrong)


@pytest.mark.parametrize("bins", [0, 60, 66, 8190])
def test_a_histogram_needs_bins_that_pair_up(bins: int) -> None:
    with pytest.raises(ConfigError, match=f"bins={bins}"):
        MAEObserver(bins=bins)


@pytest.mark.parametrize("percentile", [49.0, 100.1, float("nan")])
def test_a_percentile_is_between_half_and_all(percentile: float) -> None:
    with pytest.raises(ConfigError, match="percentile"):
        PercentileObserver(percentile=percentile)


def test_a_registered_observer_is_a_name_that_a_configuration_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repapq_plugin.observers.base.OBSERVERS", {})
    monkeypatch.setattr("repapq_plugin.observers.base.OBSERVER_NAMES", names := ["mse"])
    monkeypatch.setattr("repapq_plugin.observers.base.WEIGHT_OBSERVER_NAMES", weight_names := ["mse"])
    register_observer("roomy")(MinMaxObserver)
    register_observer("per_channel_roomy")(PerChannelMinMaxObserver)
    register_observer("mse")(MinMaxObserver)
    assert names == ["mse", "roomy"] and weight_names == ["mse", "roomy"]
    with pytest.raises(ConfigError, match="activation_observer='roomier' is not allowed; choose one of 'min_max'"):
        RepAPQConfig(activation_observer="roomier")
