"""Layers that run although nothing reads what they return: a file does without them and says so."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from repapq_plugin.core.onnx_weights import integer_layers
from repapq_plugin.evaluation.runtimes import OnnxRuntimeNetwork
from repapq_plugin.export import export_onnx
from repapq_plugin.export.calls import Call
from repapq_plugin.export.onnx_trace import unread_calls
from tests.support.export_networks import outputs_of, quantized, set_ranges


class Unread(nn.Module):
    """Has a branch whose end is dropped, as detectors have that train with more heads than they answer with."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem, self.head = (quantized(nn.Conv2d(i, o, 1), 8, 8) for i, o in ((3, 4), (4, 2)))
        self.branch, self.end = (quantized(nn.Conv2d(4, 4, 1), 8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> object:
        y = self.stem(x)
        other = self.end(self.branch(y).relu())
        if self.how == "half of it":  # the branch is read, its end is not
            return self.head(y + self.branch(y))
        if self.how == "one of two calls":
            return self.head(y + self.end(y))
        if self.how == "only its shape":
            return self.head(y) + torch.zeros_like(other[:, :2])
        if self.how == "whole numbers":
            return self.head(y), other.argmax(1)
        return self.head(y)


CASES: dict[str, tuple[set[str], int]] = {
    "all of it": ({"branch", "end"}, 2),
    "half of it": ({"branch", "end"}, 3),
    "one of two calls": ({"branch", "end"}, 3),
}


@pytest.mark.parametrize("how", CASES)
def test_a_file_does_without_what_nothing_reads(how: str, tmp_path: Path) -> None:
    unread, count = CASES[how]
    x = torch.randn(2, 3, 4, 4)
    model = set_ranges(Unread(how), x)
    summary = export_onnx(model, x, tmp_path / "model.onnx")
    assert summary.integer_layers == count == len(integer_layers(onnx.load(summary.path).graph))
    [note] = [note for note in summary.notes if note.startswith("Nothing reads what these layers return")]
    assert all(name in note for name in unread)
    assert summary.max_rel_difference is not None and summary.max_rel_difference < 1e-5
    [got], [wanted] = outputs_of(OnnxRuntimeNetwork(summary.path, threads=1), x), outputs_of(model, x)
    assert torch.allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("how", ["whole numbers", "only its shape"])
def test_what_is_read_otherwise_is_kept(how: str, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4, 4)
    summary = export_onnx(set_ranges(Unread(how), x), x, tmp_path / "model.onnx")
    assert summary.integer_layers == 4
    assert not [note for note in summary.notes if note.startswith("Nothing reads")]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        self.two(x)
        y = self.one(x).relu_()
        self.two(y)
        return self.one(y), 3


def test_calls_are_counted_one_by_one_and_nothing_is_left_behind() -> None:
    model, call = Plain(), Call((torch.randn(2, 3),), {})
    assert unread_calls(model, call, ["one", "two"]) == {"two": 2}
    assert unread_calls(model, call, ["one"]) == {}
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


class WithoutGradients(Plain):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        y = self.one(x)
        return torch.neg(y, out=y)


def test_where_gradients_cannot_tell_every_call_counts() -> None:
    model = WithoutGradients()
    assert unread_calls(model, Call((torch.randn(2, 3),), {}), ["one", "two"]) == {"one": 1}
