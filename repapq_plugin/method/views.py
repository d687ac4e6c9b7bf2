"""Views: each calibration image is learned from more than once, shifted and mirrored in between.

A few hundred images are learned by heart: on the RepVGG-A0 at W4A4 the longest stage ends with an error on its own
images that is less than half of that on others. The float network says what is right for any image, so a shifted or
mirrored one is as good as a new one.

Source: our choice; ``integration/bench/README.md`` has what it is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from repapq_plugin.core.copies import changed
from repapq_plugin.core.ranks import world
from repapq_plugin.core.running import Batch
from repapq_plugin.core.tensors import tensors_of

REACH = 8
"""An image is shifted by up to one part in so many of its height and width."""

CHANNELS, SMALLEST = (1, 3, 4), 8
"""What a tensor must have before its last two axes, and at least along those, to be taken for images."""


def is_image(tensor: Tensor) -> bool:
    """Whether a tensor holds images, ``(N, channels, H, W)``, or one as it is read from a file, uint8."""
    if tensor.dim() != 4 and not (tensor.dim() == 3 and tensor.dtype == torch.uint8):
        return False
    return tensor.shape[-3] in CHANNELS and min(tensor.shape[-2:]) >= SMALLEST


def count_views(batches: Sequence[Batch], wanted: int) -> int:
    """Return in how many views batches can be given: one where they hold no image."""
    return wanted if any(is_image(tensor) for tensor in tensors_of(batches[0])) else 1


class Views(Sequence[Batch]):
    """All batches, then all of them in another view, and so on; views are made when they are asked for.

    Args:
        batches: The batches; not changed.
        count: How many views there are, themselves among them.
        seed: Says how images are shifted and mirrored.
        number: How many batches there are on that rank which has most of them; default: as many as here.
    """

    def __init__(self, batches: Sequence[Batch], count: int, seed: int, number: int | None = None) -> None:
        self._batches, self._count, self._seed = batches, count, seed
        self._number = len(batches) if number is None else number

    def __len__(self) -> int:
        return self._number * self._count

    @property
    def own(self) -> list[int]:
        """Numbers of the batches that are here; those of other ranks cannot be asked for."""
        return [index for index in range(len(self)) if index % self._number < len(self._batches)]

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...

    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        index = range(len(self))[index]
        view, place = divmod(index, self._number)
        batch = self._batches[place]
        if view == 0:
            return batch
        # Another rank has other images under this number.
        generator = torch.Generator().manual_seed((world().rank << 40) + self._seed * len(self) + index)
        return changed(batch, lambda tensor: moved(tensor, generator) if is_image(tensor) else tensor)


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images of the same shape and dtype, each shifted by up to `REACH`, every second one mirrored, at random.

    What comes in from outside is the image itself, reflected at its border.
    """
    if images.dim() == 3:
        return moved(images.unsqueeze(0), generator).squeeze(0)
    made = []
    for image in images:
        rows, columns = (_reflected(size, generator).to(image.device) for size in image.shape[-2:])
        if torch.rand((), generator=generator) < 0.5:
            columns = columns.flip(0)
        made.append(image.index_select(-2, rows).index_select(-1, columns))
    return torch.stack(made) if made else images


def _reflected(size: int, generator: torch.Generator) -> Tensor:
    """Return which rows an image of ``size`` rows has after a random shift, int64 ``(size,)``."""
    reach = size // REACH
    rows = torch.arange(size) + torch.randint(-reach, reach + 1, (), generator=generator)
    return size - 1 - (size - 1 - rows.abs()).abs()
