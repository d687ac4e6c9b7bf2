"""Layers as maps: convolutions, average pooling and norms at inference, alone and one behind the other."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from repapq_plugin.core.modules import own_class
from repapq_plugin.errors import MergeError
from repapq_plugin.reparam.branches import qualified_name
from repapq_plugin.reparam.linear_map import LinearMap, check_channels, identity_map, in_series, scaled
from repapq_plugin.reparam.norms import has_activation, is_norm, norm_affine
from repapq_plugin.reparam.parametrized import with_computed_tensors

Size = int | tuple[int, ...]
"""One number, or (rows, columns), as torch's layers take it."""

_DROPOUT = nn.modules.dropout._DropoutNd
# Written out for empty inputs only; on every other input they are torch's own.
_SAME_AS_CONV2D = ("mmcv.cnn.bricks.wrappers.Conv2d",)
_SAME_AS_LINEAR = ("mmcv.cnn.bricks.wrappers.Linear",)


def _pair(value: Size) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return int(first), int(second)


def _taps(size: tuple[int, int], dilation: tuple[int, int], padding: tuple[int, int]) -> list[tuple[int, ...]]:
    axes = zip(size, dilation, padding, strict=True)
    return [tuple(i * step - before for i in range(count)) for count, step, before in axes]


def is_plain_conv(module: nn.Module) -> bool:
    """Tell whether a module runs as ``nn.Conv2d`` does, and not something of its own."""
    if not isinstance(module, nn.Conv2d):
        return False
    cls = type(module)
    own = cls.forward is not nn.Conv2d.forward or cls._conv_forward is not nn.Conv2d._conv_forward
    return "forward" not in vars(module) and (not own or qualified_name(cls) in _SAME_AS_CONV2D)


def is_plain_linear(module: nn.Module) -> bool:
    """Tell whether a module runs as ``nn.Linear`` does, and not something of its own."""
    if not isinstance(module, nn.Linear) or "forward" in vars(module):
        return False
    return type(module).forward is nn.Linear.forward or qualified_name(type(module)) in _SAME_AS_LINEAR


def _conv_map(conv: nn.Conv2d, where: str) -> LinearMap:
    if not is_plain_conv(conv):
        raise MergeError(
            f"{where}: {qualified_name(own_class(conv))} computes something of its own, not a plain convolution."
        )
    if conv.padding_mode != "zeros":
        raise MergeError(f"{where}: padding_mode={conv.padding_mode!r}; only 'zeros' can be merged.")
    conv = with_computed_tensors(conv)
    return conv2d_map(conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def conv2d_map(
    weight: Tensor,
    bias: Tensor | None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> LinearMap:
    """Read the arguments of ``torch.nn.functional.conv2d`` as a map.

    Args:
        weight: ``[out_channels, in_channels / groups, rows, cols]``.
        bias: ``[out_channels]`` or None.
        stride: One number or (rows, columns).
        padding: The same, or ``"same"`` or ``"valid"``.
        dilation: One number or (rows, columns).
        groups: Number of channel groups.
    """
    size, steps = _pair(tuple(weight.shape[2:])), _pair(dilation)
    reach = [step * (count - 1) for step, count in zip(steps, size, strict=True)]
    if padding == "same":
        # torch puts the odd one at the end.
        before, total = (reach[0] // 2, reach[1] // 2), (reach[0], reach[1])
    else:
        before = (0, 0) if isinstance(padding, str) else _pair(padding)
        total = (2 * before[0], 2 * before[1])
    rows, cols = _taps(size, steps, before)
    weight = weight.detach().double()
    bias = weight.new_zeros(len(weight)) if bias is None else bias.detach().double()
    slack = (total[0] - reach[0] - 1, total[1] - reach[1] - 1)
    return LinearMap(weight, bias, rows, cols, _pair(stride), slack, groups)


def _pool_map(pool: nn.AvgPool2d, channels: int, like: Tensor, where: str) -> LinearMap:
    size, padding = _pair(pool.kernel_size), _pair(pool.padding)
    if pool.ceil_mode or (not pool.count_include_pad and padding != (0, 0)):
        raise MergeError(
            f"{where}: AvgPool2d with ceil_mode, or one that leaves padding out of the mean, has other "
            "weights at the border and is no convolution."
        )
    rows, cols = _taps(size, (1, 1), padding)
    weight = like.new_full((channels, 1, *size), 1 / (pool.divisor_override or math.prod(size)))
    slack = (2 * padding[0] - size[0], 2 * padding[1] - size[1])
    return LinearMap(weight, like.new_zeros(channels), rows, cols, _pair(pool.stride), slack, channels)


def flattened(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Open nested ``nn.Sequential`` that have no forward of their own, and drop what does nothing at inference."""
    flat: list[nn.Module] = []
    for layer in layers:
        if isinstance(layer, nn.Sequential) and type(layer).forward is nn.Sequential.forward:
            flat.extend(flattened(list(layer)))
        elif not isinstance(layer, nn.Identity | _DROPOUT):
            flat.append(layer)
    return flat


def input_channels(layers: Sequence[nn.Module]) -> int | None:
    """Channels that a branch reads, or None where it takes any number (identity, pooling)."""
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            return layer.in_channels
        if is_norm(layer):
            return len(norm_affine(layer)[0])
    return None


def branch_map(layers: Sequence[nn.Module], channels: int, like: Tensor, where: str) -> LinearMap:
    """Compose the layers of one branch.

    Args:
        layers: In order, already `flattened`.
        channels: Channels of the block's input.
        like: A float64 tensor on the block's device.
        where: Path of the block, for the error text.

    Raises:
        MergeError: A layer is not linear, or the composition is not exact.
    """
    result: LinearMap | None = None
    for layer in layers:
        width = channels if result is None else result.out_channels
        if isinstance(layer, nn.Conv2d):
            step = _conv_map(layer, where)
        elif isinstance(layer, nn.AvgPool2d):
            step = _pool_map(layer, width, like, where)
        elif is_norm(layer):
            if has_activation(layer):
                raise MergeError(f"{where}: {type(layer).__name__} applies an activation inside a branch.")
            scale, shift = norm_affine(layer, f"{where}: {type(layer).__name__}")
            check_channels(width, len(scale), where)
            result = scaled(identity_map(width, like) if result is None else result, scale, shift)
            continue
        else:
            raise MergeError(f"{where}: {type(layer).__name__} is not a linear layer that can be merged.")
        result = step if result is None else in_series(result, step, where)
    return identity_map(channels, like) if result is None else result
