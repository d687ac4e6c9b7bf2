"""Full memory is not a reason to leave a block as it is: it is said."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from repapq_plugin.reparam import Branch, BranchSpec, branches, merge_branches


class Full(nn.Module):
    """Two branches in float64 or float32, in whose forward memory ends, from the ``good``-th run on."""

    def __init__(self, good: int = 0) -> None:
        super().__init__()
        self.conv3, self.conv1, self.good = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1), good

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor) and type(x) is Tensor:
            if self.good == 0:
                raise torch.OutOfMemoryError("out of memory")
            self.good -= 1
        return self.conv3(x) + self.conv1(x)


class Untraceable(Full):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > -1e9 else x


def test_while_a_taught_block_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def describe(block: Full) -> BranchSpec:
        return BranchSpec((Branch((block.conv3,)), Branch((block.conv1,))))

    monkeypatch.setattr(branches, "_BY_CLASS", {Full: describe})
    with pytest.raises(torch.OutOfMemoryError):
        merge_branches(nn.Sequential(Full()))


def test_while_a_taught_block_tells_its_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    def describe(block: Full) -> BranchSpec:
        raise MemoryError

    monkeypatch.setattr(branches, "_BY_CLASS", {Full: describe})
    with pytest.raises(MemoryError):
        merge_branches(nn.Sequential(Full()))


def test_while_a_block_of_unknown_class_is_compared() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        merge_branches(nn.Sequential(Full()))


@pytest.mark.parametrize("good", [0, 1, 2, 12])
def test_while_a_block_is_asked_for_its_impulse_response(good: int) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        merge_branches(nn.Sequential(Untraceable(good)))
