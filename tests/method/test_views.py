"""Views of calibration images: what is moved, what never is, and that nothing held out is learned from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.method.optimise import split_batches
from repapq_plugin.method.views import REACH, Views, count_views, is_image, moved


@given(
    shape=st.tuples(st.integers(0, 3), st.sampled_from([1, 3, 4]), st.integers(8, 20), st.integers(8, 20)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.uint8]),
    seed=st.integers(0, 1000),
)
def test_an_image_keeps_its_shape_dtype_and_colours(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    images = (torch.rand(shape) * 255).to(dtype)
    before = images.clone()
    view = moved(images, torch.Generator().manual_seed(seed))
    assert view.shape == images.shape and view.dtype == dtype and torch.equal(images, before)
    for image, other in zip(images, view, strict=True):
        assert set(other.flatten().tolist()) <= set(image.flatten().tolist())


def test_the_middle_of_an_image_is_shifted_and_every_second_one_mirrored() -> None:
    columns = torch.arange(32.0).expand(64, 1, 32, 32)
    view = moved(columns, torch.Generator().manual_seed(0))
    middle = view[:, 0, 16, 8:24]
    steps = middle.diff(dim=1)
    mirrored = steps[:, 0] < 0
    assert torch.equal(steps.abs(), torch.ones_like(steps)) and torch.equal((steps < 0).all(1), mirrored)
    assert 16 < int(mirrored.sum()) < 48
    shifts = middle[~mirrored][:, 0] - 8
    assert shifts.abs().max() <= 32 // REACH and len(shifts.unique()) > 4


def test_only_images_are_moved() -> None:
    assert is_image(torch.zeros(2, 3, 16, 16)) and is_image(torch.zeros(3, 16, 16, dtype=torch.uint8))
    for other in (torch.zeros(2, 16, 64), torch.zeros(2, 64, 16, 16), torch.zeros(2, 3), torch.zeros(2, 3, 4, 4)):
        assert not is_image(other)
    tokens, boxes = torch.randint(0, 9, (2, 16)), torch.rand(5, 4)
    batch = {"inputs": [torch.randint(0, 255, (3, 16, 16), dtype=torch.uint8)], "samples": (boxes, tokens)}
    views = Views([batch], 3, seed=1)
    assert len(views) == 3 and views[0] is batch
    other: Any = views[2]
    assert torch.equal(other["samples"][0], boxes) and torch.equal(other["samples"][1], tokens)
    assert not torch.equal(other["inputs"][0], batch["inputs"][0])
    assert count_views([batch], 3) == 3 and count_views([{"ids": tokens}], 3) == 1


def test_a_view_is_the_same_whenever_it_is_asked_for_and_another_for_another_seed() -> None:
    batches = [torch.rand(2, 3, 16, 16) for _ in range(3)]
    views, again = Views(batches, 4, seed=5), Views(batches, 4, seed=5)
    backwards = [again[index] for index in reversed(range(len(again)))][::-1]
    assert all(torch.equal(one, other) for one, other in zip(views, backwards, strict=True))  # type: ignore[arg-type]
    assert not torch.equal(views[4], Views(batches, 4, seed=6)[4])  # type: ignore[arg-type]
    assert views[-1] is not None and len(views[2:5]) == 3
    with pytest.raises(IndexError):
        views[12]


@given(st.integers(1, 20), st.integers(1, 5), st.sampled_from([0.0, 0.125, 0.5]))
def test_a_held_out_image_is_learned_from_in_no_view(batches: int, views: int, fraction: float) -> None:
    training, held_out = split_batches(batches * views, fraction, views)
    one, other = split_batches(batches, fraction)
    assert sorted({index % batches for index in training}) == one and len(training) == len(one) * views
    assert sorted({index % batches for index in held_out}) == other and len(held_out) == len(other) * views


def test_a_network_learns_from_views_and_the_batches_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    batches = [torch.randn(4, 3, 16, 16) for _ in range(4)]
    before = [batch.clone() for batch in batches]
    config = RepAPQConfig.from_preset("w4a4", steps=5)
    one, more = (quantize_model(model, batches, config.replace(views=views)) for views in (1, 3))
    assert all(torch.equal(batch, was) for batch, was in zip(batches, before, strict=True))
    outputs = [result.model(batches[0]) for result in (one, more)]
    assert not torch.equal(*outputs)
    again = quantize_model(model, batches, config.replace(views=3))
    assert torch.equal(again.model(batches[0]), outputs[1])
