"""What a multi-branch block becomes, and the record of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

from torch import Tensor, nn


class OneInput(nn.Module):
    """A role of one input, which may be given by whatever name the module's own forward has for it."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run hooks and forward."""
        if not args and len(kwargs) == 1:
            args, kwargs = tuple(kwargs.values()), {}
        return super().__call__(*args, **kwargs)


class MergedBlock(OneInput):
    """A block whose branches are one convolution.

    The user's own block plays this role (see `repapq_plugin.reparam.take_over`); what the constructor makes is a
    module for itself.

    Args:
        conv: The merged convolution; in a block, the child ``conv``.
        after: What followed the sum of the branches, in order; the child ``after``.
    """

    _repapq_children = ("conv", "after")
    """Names of both children; others than these where the block itself has such a name."""

    _repapq_moved: Mapping[str, str] = MappingProxyType({})
    """Where children of the block are now that it names itself."""

    def __init__(self, conv: nn.Conv2d, after: Collection[nn.Module] = ()) -> None:
        super().__init__()
        self.conv = conv
        self.after = nn.Sequential(*(layer for layer in after if type(layer) is not nn.Identity))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, in_channels, height, width]`` to the block's output."""
        conv, after = (getattr(self, name) for name in self._repapq_children)
        return cast(Tensor, after(conv(x)))

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        try:
            return super().__getattr__(name)
        except AttributeError:
            place = self._repapq_moved.get(name)
            if place is None:
                raise
            return self.get_submodule(place)


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
        merged: Whether the branches were merged.
        reason: Why not; empty if they were.
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
