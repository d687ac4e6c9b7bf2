"""Exact algebra of 2d convolutions: taps on a grid, composed in series, added in parallel, written as one layer.

Output ``o`` of a map at position ``q`` is
``bias[o] + sum weight[o, c, i, j] * x[c, stride * q + (rows[i], cols[j])]`` with ``x`` zero outside
the image. Everything is float64 (our choice: float32 sums of branches lose
what the check of equality needs).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from repapq_plugin.errors import MergeError


@dataclass(frozen=True)
class LinearMap:
    """A linear layer, or a whole branch, as taps on a grid.

    Args:
        weight: ``[out_channels, in_channels / groups, len(rows), len(cols)]``, float64.
        bias: ``[out_channels]``, float64.
        rows: Offsets of the taps from the position read, ascending.
        cols: The same along the width.
        stride: Distance of neighbouring outputs in the input, (rows, columns).
        slack: Fixes the output's size along each axis: ``(size + slack) // stride + 1``.
        groups: Number of channel groups.
    """

    weight: Tensor
    bias: Tensor
    rows: tuple[int, ...] = (0,)
    cols: tuple[int, ...] = (0,)
    stride: tuple[int, int] = (1, 1)
    slack: tuple[int, int] = (-1, -1)
    groups: int = 1

    @property
    def out_channels(self) -> int:
        """Channels written."""
        return self.weight.shape[0]

    @property
    def in_channels(self) -> int:
        """Channels read."""
        return self.weight.shape[1] * self.groups

    @property
    def is_pointwise(self) -> bool:
        """One tap, at the position itself."""
        return self.rows == self.cols == (0,) and self.slack == (-1, -1)

    @property
    def is_diagonal(self) -> bool:
        """One tap and one channel in, one out: a scale and a shift per channel."""
        return self.is_pointwise and self.groups == self.in_channels == self.out_channels

    @property
    def reads_padding(self) -> bool:
        """Some output reads positions outside the image."""
        axes = zip((self.rows, self.cols), self.slack, strict=True)
        return any(taps[0] < 0 or slack + taps[-1] > -1 for taps, slack in axes)


def identity_map(channels: int, like: Tensor) -> LinearMap:
    """Return the identity on ``channels`` channels, on the device of ``like``."""
    ones = torch.ones(channels, 1, 1, 1, dtype=torch.float64, device=like.device)
    return LinearMap(ones, torch.zeros_like(ones[:, 0, 0, 0]), groups=channels)


def on_device_of(linear: LinearMap, other: Tensor) -> LinearMap:
    """Return a map with its weights where another tensor is: layers of one block may be on several devices."""
    device = other.device
    return replace(linear, weight=linear.weight.to(device), bias=linear.bias.to(device))


def scaled(linear: LinearMap, scale: Tensor, shift: Tensor | float = 0.0) -> LinearMap:
    """Multiply the outputs of a map by ``scale`` (one or one per channel) and add ``shift``, where the map is."""
    scale = scale.to(linear.weight.device)
    shift = shift.to(linear.weight.device) if isinstance(shift, Tensor) else shift
    return replace(linear, weight=linear.weight * scale.reshape(-1, 1, 1, 1), bias=linear.bias * scale + shift)


def _regrouped(linear: LinearMap, groups: int) -> Tensor:
    """Weight of a map written with fewer groups (a divisor of its own), zeros filled in."""
    if groups == linear.groups:
        return linear.weight
    outputs, inputs, *taps = linear.weight.shape
    ratio = linear.groups // groups
    blocks = linear.weight.reshape(groups, ratio, outputs // linear.groups, inputs, *taps)
    dense = blocks.new_zeros(groups, ratio, outputs // linear.groups, ratio, inputs, *taps)
    for index in range(ratio):
        dense[:, index, :, index] = blocks[:, index]
    return dense.reshape(outputs, ratio * inputs, *taps)


def _split(weight: Tensor, groups: int) -> Tensor:
    """View ``[out, in, rows, cols]`` as ``[groups, out / groups, in, rows, cols]``."""
    return weight.reshape(groups, -1, *weight.shape[1:])


def condensed(linear: LinearMap) -> LinearMap:
    """Write a map with as many groups as its zeros allow, and without rows and columns of zero taps."""
    weight = linear.weight
    rows = [i for i in range(len(linear.rows)) if bool(weight[:, :, i].any())] or [0]
    cols = [j for j in range(len(linear.cols)) if bool(weight[..., j].any())] or [0]
    weight = weight[:, :, rows][..., cols]
    touched = _regrouped(replace(linear, weight=(weight != 0).double().amax((2, 3), keepdim=True)), 1)
    groups = math.gcd(linear.in_channels, linear.out_channels)
    while groups > linear.groups and (groups % linear.groups or not _is_block_diagonal(touched[:, :, 0, 0], groups)):
        groups -= 1
    if groups > linear.groups:
        dense = _regrouped(replace(linear, weight=weight), 1)
        blocks = dense.reshape(groups, linear.out_channels // groups, groups, -1, *dense.shape[2:])
        weight = torch.stack([blocks[index, :, index] for index in range(groups)]).flatten(0, 1)
    taps = tuple(linear.rows[i] for i in rows), tuple(linear.cols[j] for j in cols)
    return replace(linear, weight=weight, rows=taps[0], cols=taps[1], groups=max(groups, linear.groups))


def _is_block_diagonal(touched: Tensor, groups: int) -> bool:
    outputs, inputs = touched.shape
    if outputs % groups or inputs % groups:
        return False
    blocks = touched.reshape(groups, outputs // groups, groups, inputs // groups).amax((1, 3))
    return not bool((blocks - torch.diag(blocks.diagonal())).any())


def check_channels(given: int, wanted: int, where: str) -> None:
    """Raise `MergeError` if a layer of ``wanted`` channels is ``given`` another number."""
    if given != wanted:
        raise MergeError(f"{where}: a layer of {wanted} channels is given {given}.")


def in_series(first: LinearMap, second: LinearMap, where: str, *, shifts: bool | None = None) -> LinearMap:
    """Compose two maps, ``second`` behind ``first``; the result is where ``first`` is.

    Args:
        first: Reads the input.
        second: Reads what ``first`` gives.
        where: Path of the block, for the error text.
        shifts: Whether ``first`` has to be taken to add a bias; default: whether it does now.

    Raises:
        MergeError: ``second`` pads what ``first`` gives, and zero is not what ``first`` would give
            outside the image: no convolution behaves like that at the border.
    """
    check_channels(first.out_channels, second.in_channels, where)
    second = on_device_of(second, first.weight)
    shifts = bool(first.bias.any()) if shifts is None else shifts
    if second.reads_padding and (shifts or not first.is_pointwise):
        raise MergeError(
            f"{where}: a padded layer follows a layer with a bias, a norm or a kernel of its own. The "
            "border sees zeros there that the merged convolution would not; move the padding to the "
            "branch's first layer."
        )
    groups = math.gcd(first.groups, second.groups)
    outer = _split(_regrouped(second, groups), groups)
    bias = torch.einsum("gomij,gm->go", outer, first.bias.reshape(groups, -1)).flatten() + second.bias
    step = first.stride
    rows = sorted({a + step[0] * b for a in first.rows for b in second.rows})
    cols = sorted({a + step[1] * b for a in first.cols for b in second.cols})
    if first.is_diagonal:
        weight = _scale_inputs(second, first.weight.flatten())
        groups = second.groups
    else:
        inner = _split(_regrouped(first, groups), groups)
        weight = inner.new_zeros(second.out_channels, inner.shape[2], len(rows), len(cols))
        for i, row in enumerate(second.rows):
            for j, col in enumerate(second.cols):
                at_rows = [rows.index(a + step[0] * row) for a in first.rows]
                at_cols = [cols.index(a + step[1] * col) for a in first.cols]
                product = torch.einsum("gom,gmcij->gocij", outer[..., i, j], inner).flatten(0, 1)
                weight[:, :, _index(at_rows, weight)[:, None], _index(at_cols, weight)] += product
    return LinearMap(
        weight,
        bias,
        tuple(rows),
        tuple(cols),
        (step[0] * second.stride[0], step[1] * second.stride[1]),
        (
            first.slack[0] + step[0] * (1 + second.slack[0]),
            first.slack[1] + step[1] * (1 + second.slack[1]),
        ),
        groups,
    )


def _index(places: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(places, device=like.device)


def _scale_inputs(linear: LinearMap, scale: Tensor) -> Tensor:
    grouped = _split(linear.weight, linear.groups) * scale.reshape(linear.groups, 1, -1, 1, 1)
    return grouped.flatten(0, 1)


def in_parallel(maps: Sequence[LinearMap], where: str) -> LinearMap:
    """Add maps that read the same input: the union of their taps, the largest common group count.

    The result is where the first one is.

    Raises:
        MergeError: Channels, strides or output sizes differ, so that the outputs cannot be added.
    """
    first = maps[0]
    for other in maps[1:]:
        shapes = [(member.in_channels, member.out_channels) for member in (first, other)]
        if shapes[0] != shapes[1]:
            raise MergeError(f"{where}: branches have {shapes[0]} and {shapes[1]} channels in and out.")
        if other.stride != first.stride:
            raise MergeError(f"{where}: branches have strides {first.stride} and {other.stride}.")
        if other.slack != first.slack:
            raise MergeError(
                f"{where}: branches give outputs of different sizes; kernel, dilation and padding do "
                "not belong together."
            )
    groups = math.gcd(*(member.groups for member in maps))
    rows = sorted({tap for member in maps for tap in member.rows})
    cols = sorted({tap for member in maps for tap in member.cols})
    weight = first.weight.new_zeros(first.out_channels, first.in_channels // groups, len(rows), len(cols))
    maps = [on_device_of(member, first.weight) for member in maps]
    for member in maps:
        at_rows = _index([rows.index(tap) for tap in member.rows], weight)
        at_cols = _index([cols.index(tap) for tap in member.cols], weight)
        weight[:, :, at_rows[:, None], at_cols] += _regrouped(member, groups)
    bias = torch.stack([member.bias for member in maps]).sum(0)
    return replace(first, weight=weight, bias=bias, rows=tuple(rows), cols=tuple(cols), groups=groups)


def _grid(taps: tuple[int, ...], slack: int) -> tuple[int, int, int]:
    """Smallest evenly spaced, evenly padded kernel that has all ``taps``: (size, dilation, padding)."""
    total = -(slack + 1)
    low = min(taps[0], total - taps[-1], 0)
    high = total - low
    step = math.gcd(high - low, *(tap - low for tap in taps)) or 1
    return (high - low) // step + 1, step, -low


def to_conv(linear: LinearMap, dtype: torch.dtype) -> nn.Conv2d:
    """Write a map as one convolution with bias.

    Args:
        linear: The map.
        dtype: Type of the convolution's parameters.
    """
    grids = [_grid(linear.rows, linear.slack[0]), _grid(linear.cols, linear.slack[1])]
    size, dilation, padding = zip(*grids, strict=True)
    # skip_init leaves the global random state alone, which nn.Conv2d's initialisation would advance.
    conv: nn.Conv2d = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Conv2d,
        linear.in_channels,
        linear.out_channels,
        size,
        stride=linear.stride,
        padding=padding,
        dilation=dilation,
        groups=linear.groups,
        bias=True,
        dtype=dtype,
        device=linear.weight.device,
    )
    at_rows = _index([(tap + padding[0]) // dilation[0] for tap in linear.rows], linear.weight)
    at_cols = _index([(tap + padding[1]) // dilation[1] for tap in linear.cols], linear.weight)
    weight = linear.weight.new_zeros(conv.weight.shape)
    weight[:, :, at_rows[:, None], at_cols] = linear.weight
    with torch.no_grad():
        conv.weight.copy_(weight)
        if conv.bias is not None:
            conv.bias.copy_(linear.bias)
    return conv
