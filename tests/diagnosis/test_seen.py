"""What quantizers are given is counted as numpy counts it, and what was planted is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.diagnosis.seen import SeenTensor, observe_activations
from tests.support.networks import Chain, settle

CHANNEL, SAMPLE = 2, 5
"""Where a value is planted."""


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    torch.manual_seed(0)
    batches = [torch.rand(4, 3, 16, 16) for _ in range(3)]
    batches[SAMPLE // 4][SAMPLE % 4, CHANNEL, 3, 3] = 40.0
    return batches


@pytest.fixture(scope="module")
def seen(images: list[Tensor]) -> list[SeenTensor]:
    result = quantize_model(
        settle(Chain()),
        images,
        RepAPQConfig(steps=0, activation_observer="percentile", percentile=99.9, equalize=False),
    )
    found = observe_activations(result.model, lambda batch: result.model(batch), images)
    assert {name for it in found for name in it.layers} == set(result.layers)
    return found


def test_the_planted_value_is_found_by_channel_and_sample(seen: list[SeenTensor], images: list[Tensor]) -> None:
    peaks = seen[0].by_sample
    assert peaks.shape == (3, 12)
    np.testing.assert_allclose(peaks.numpy().T, torch.cat(images).abs().amax((2, 3)).numpy())
    assert divmod(int(peaks.argmax()), 12) == (CHANNEL, SAMPLE)
    assert seen[0].outlying == pytest.approx(float(peaks.max() / peaks.median()))


def test_what_is_clipped_is_counted_as_numpy_counts_it(seen: list[SeenTensor], images: list[Tensor]) -> None:
    values, it = torch.cat(images).double().numpy(), seen[0]
    assert 0 < it.high < 40
    outside = (values < it.low - it.step / 2) | (values > it.high + it.step / 2)
    assert it.clipped == pytest.approx(float(outside.mean()), rel=1e-3)
    assert it.clipped > 0


def test_more_batches_add_a_number_a_channel_and_sample_and_nothing_else(images: list[Tensor]) -> None:
    result = quantize_model(settle(Chain()), images, RepAPQConfig(steps=0))
    few, many = (observe_activations(result.model, lambda batch: result.model(batch), images * n) for n in (1, 4))
    for one, four in zip(few, many, strict=True):
        assert one.histogram.counts.shape == four.histogram.counts.shape
        assert torch.equal(4 * one.histogram.counts, four.histogram.counts)
        assert four.by_sample.shape[1] == 4 * one.by_sample.shape[1]


def test_a_float_network_has_nothing_to_look_at() -> None:
    assert observe_activations(nn.Conv2d(3, 3, 1), lambda _: None, [torch.zeros(1)]) == []
