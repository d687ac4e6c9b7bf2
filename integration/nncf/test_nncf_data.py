"""Items of an `nncf.Dataset`, joined into batches where the network allows it."""

from __future__ import annotations

from typing import Any

import nncf
import torch
from torch import Tensor, nn

from repapq_plugin.hosts.nncf.data import calibration_items, described, joined


class Mean(nn.Module):
    """Looks at all samples together."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


def test_single_images_become_batches() -> None:
    items = [torch.randn(1, 2, 3, 3) for _ in range(70)]
    batches = joined(nn.Conv2d(2, 2, 1), items)
    assert [len(batch) for batch in batches] == [32, 32, 6]
    assert torch.equal(torch.cat(batches), torch.cat(items))


def test_dicts_and_tuples_are_joined_by_their_parts() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    pairs = [(torch.full((1, 2), float(i)), torch.ones(1, 2)) for i in range(5)]
    (both,) = joined(Sum(), pairs)
    assert isinstance(both, tuple) and torch.equal(both[0][:, 0], torch.arange(5.0))
    named: list[Any] = [{"x": x, "y": y} for x, y in pairs]
    (joint,) = joined(Sum(), named)
    assert set(joint) == {"x", "y"} and joint["y"].shape == (5, 2)


def test_other_shapes_begin_other_batches() -> None:
    items = [torch.randn(1, 2, size, size) for size in (4, 4, 5, 5, 4)]
    assert [tuple(batch.shape) for batch in joined(nn.Conv2d(2, 2, 1), items)] == [
        (2, 2, 4, 4),
        (2, 2, 5, 5),
        (1, 2, 4, 4),
    ]


def test_networks_that_mix_samples_keep_their_items() -> None:
    items = [torch.randn(1, 4) for _ in range(4)]
    assert joined(Mean(), items) is items
    rows = [torch.randn(3) for _ in range(4)]  # one sample without an axis of samples
    assert joined(nn.Softmax(0), rows) is rows


def test_large_batches_stay() -> None:
    items = [torch.randn(32, 2, 3, 3) for _ in range(3)]
    assert joined(nn.Conv2d(2, 2, 1), items) is items


def test_no_more_items_are_drawn_than_wanted() -> None:
    drawn = []

    def transform(item: int) -> int:
        drawn.append(item)
        return item

    assert calibration_items(nncf.Dataset(range(100), transform), 5) == [0, 1, 2, 3, 4]
    assert len(drawn) == 5


def test_descriptions_name_shapes() -> None:
    item = {"x": torch.zeros(1, 2), "meta": (torch.zeros(3, dtype=torch.int64), "name")}
    assert described(item) == "{x: float32 (1, 2), meta: (int64 (3,), str)}"
