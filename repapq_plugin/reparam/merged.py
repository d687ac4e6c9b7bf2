"""What a multi-branch block becomes, and the record of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn


class MergedBlock(nn.Module):
    """A block whose branches are one convolution.

    Args:
        conv: The merged convolution.
        after: What followed the sum of the branches, in order.
    """

    def __init__(self, conv: nn.Conv2d, after: Collection[nn.Module] = ()) -> None:
        super().__init__()
        self.conv = conv
        self.after = nn.Sequential(*(layer for layer in after if type(layer) is not nn.Identity))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, in_channels, height, width]`` to the block's output."""
        return cast(Tensor, self.after(self.conv(x)))


@dataclass(frozen=True)
class MergeRecord:
    """What became of one multi-branch block.

    Args:
        name: Module path of the block (the first, if it has several).
        block_class: Full class name.
        branches: Number of branches; 0 if they could not be read.
        kernel_size: Of the merged convolution, (rows, columns); None if there is none.
        max_rel_error: Largest difference between branched and merged block on random input, relative
            to the largest branched output; None if it was not measured.
        merged: Whether the block was replaced.
        reason: Why not; empty if it was.
        found_by: ``"class"`` for a block whose class was taught, ``"algebra"`` for one that was
            recognised by what its forward computes.
    """

    name: str
    block_class: str
    branches: int
    kernel_size: tuple[int, int] | None
    max_rel_error: float | None
    merged: bool
    reason: str = ""
    found_by: str = "class"
