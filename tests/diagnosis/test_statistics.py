"""Sums batch by batch give what numpy gives of all values at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repapq_plugin.diagnosis.statistics import BINS, ChannelStatistics

DRAWS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "relu": lambda rng, n: np.maximum(rng.standard_normal(n), 0),
    "heavy tails": lambda rng, n: rng.standard_t(3, n),
    "away from zero": lambda rng, n: 1e4 + rng.standard_normal(n),
    "uniform": lambda rng, n: rng.uniform(-1, 2, n),
}


def kurtosis(x: np.ndarray) -> float:
    centred = x - x.mean()
    return float((centred**4).mean() / (centred**2).mean() ** 2)


def top_share(x: np.ndarray) -> float:
    magnitudes = np.abs(x)
    return float(1 - np.quantile(magnitudes, 0.999) / magnitudes.max())


@pytest.mark.parametrize("kind", DRAWS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), batches=st.integers(1, 4), scale=st.sampled_from([1e-6, 1.0, 300.0]))
def test_figures_are_those_of_numpy(kind: str, seed: int, batches: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    sizes = np.array([0.1, 1.0, 40.0])[:, None, None]
    values = np.stack([DRAWS[kind](rng, (batches * 5, 600)) for _ in range(3)]) * sizes * scale
    statistics = ChannelStatistics(3)
    for part in np.split(values, batches, axis=1):
        statistics.add(torch.from_numpy(part).transpose(0, 1))
    by_channel, together = statistics.by_channel, statistics.together
    for channel, x in enumerate(values):
        assert float(by_channel.maximum[channel]) == np.abs(x).max()
        assert float(by_channel.kurtosis[channel]) == pytest.approx(kurtosis(x), rel=1e-6)
        assert float(by_channel.power[channel]) == pytest.approx((x**2).mean(), rel=1e-9)
        assert float(by_channel.variance[channel]) == pytest.approx(x.var(), rel=1e-6)
        assert float(by_channel.top_share[channel]) == pytest.approx(top_share(x), abs=3 / BINS + 0.02)
    assert float(together.maximum) == np.abs(values).max()
    assert float(together.kurtosis) == pytest.approx(kurtosis(values), rel=1e-6)
    assert float(together.power) == pytest.approx((values**2).mean(), rel=1e-9)
    assert float(together.variance) == pytest.approx(values.var(), rel=1e-6)
    assert float(together.top_share) == pytest.approx(top_share(values), abs=3 / BINS + 0.02)


def test_noise_is_measured_by_channel_and_for_all() -> None:
    rng = np.random.default_rng(0)
    x, error = rng.standard_normal((4, 3, 50)), 0.1 * rng.standard_normal((4, 3, 50))
    error[:, 2] = 0
    statistics = ChannelStatistics(3)
    statistics.add(torch.from_numpy(x))
    for part in range(2):
        rows = slice(2 * part, 2 * part + 2)
        statistics.add_noise(torch.from_numpy(x[rows]), torch.from_numpy(x[rows] + error[rows]))
    snr = statistics.by_channel.snr
    wanted = 10 * np.log10((x**2).sum((0, 2))[:2] / (error**2).sum((0, 2))[:2])
    np.testing.assert_allclose(snr[:2], wanted)
    np.testing.assert_allclose(statistics.by_channel.noise, (error**2).mean((0, 2)))
    assert float(snr[2]) == np.inf
    assert float(statistics.together.snr) == pytest.approx(10 * np.log10((x**2).sum() / (error**2).sum()))


def test_a_dead_channel_has_no_figures_and_harms_no_other() -> None:
    x = torch.randn(4, 2, 100)
    x[:, 1] = 0
    statistics = ChannelStatistics(2)
    statistics.add(x)
    found = statistics.by_channel
    assert float(found.maximum[1]) == float(found.top_share[1]) == 0
    assert torch.isnan(found.kurtosis[1]) and torch.isnan(found.snr).all()
    assert float(found.kurtosis[0]) == pytest.approx(kurtosis(x[:, 0].double().numpy()), rel=1e-6)
    assert float(statistics.together.maximum) == float(x.abs().max())
