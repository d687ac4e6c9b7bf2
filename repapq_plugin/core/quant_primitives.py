"""The uniform quantizer: ``q = clamp(round(x / scale) + zero_point, quant_min, quant_max)``.

All functions work on tensors of any floating dtype and device. ``scale`` and ``zero_point`` are
scalars (per tensor) or of shape ``(channels,)`` together with ``ch_axis`` (per channel).
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = float(torch.finfo(torch.float32).eps)
"""Smallest scale that is used: a range of zero width (a dead channel) must not divide by zero."""

CONTAINERS = {torch.uint8: (0, 255), torch.int8: (-128, 127)}
"""Integer types that carry a grid of 2 to 8 bits, and the smallest and largest code of each."""


def activation_bounds(num_bits: int, *, signed: bool = False) -> tuple[int, int]:
    """Return ``(quant_min, quant_max)``: 0 to ``2**b - 1``, or ``-2**(b-1)`` to ``2**(b-1) - 1`` of a signed grid."""
    low = -(2 ** (num_bits - 1)) if signed else 0
    return low, low + 2**num_bits - 1


def weight_bounds(num_bits: int) -> tuple[int, int]:
    """Return ``(quant_min, quant_max)`` of a signed narrow-range grid: plus and minus ``2**(b-1) - 1``.

    Narrow, because QPR's fold moves the sign of gamma into the integers, and ``-(-2**(b-1))`` would
    not fit.
    """
    bound = 2 ** (num_bits - 1) - 1
    return -bound, bound


def _along(values: Tensor, x: Tensor, ch_axis: int | None) -> Tensor:
    if ch_axis is None or values.dim() == 0:
        return values
    shape = [1] * x.dim()
    shape[ch_axis] = -1
    return values.reshape(shape)


def choose_qparams(
    min_val: Tensor, max_val: Tensor, quant_min: int, quant_max: int, *, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Turn a real range into ``(scale, zero_point)``; zero is always exactly representable.

    Args:
        min_val: Lower bound(s), float, scalar or ``(channels,)``.
        max_val: Upper bound(s), same shape.
        quant_min: Smallest integer of the grid.
        quant_max: Largest integer of the grid.
        symmetric: Centre the grid on zero: ``zero_point`` is its middle, 0 for a signed grid, 128 for
            the unsigned one of 8 bits.

    Returns:
        ``scale`` (float, at least `EPS`) and ``zero_point`` (int64), of the inputs' shape.
    """
    low, high = min_val.clamp(max=0), max_val.clamp(min=0)
    if symmetric:
        scale = torch.maximum(-low, high) / ((quant_max - quant_min) / 2)
        middle = (quant_min + quant_max + 1) // 2
        return scale.clamp(min=EPS), torch.full_like(scale, middle, dtype=torch.int64)
    scale = ((high - low) / (quant_max - quant_min)).clamp(min=EPS)
    zero_point = (quant_min - torch.round(low / scale)).clamp(quant_min, quant_max)
    return scale, zero_point.to(torch.int64)


def powers_around(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest power of two that is not above each scale, and its double, exactly, in the scales' shape."""
    mantissa, _ = torch.frexp(scale)  # from a half to one, and a power of two in front of it
    low = scale / mantissa / 2
    return low, 2 * low


def grid_bounds(scale: Tensor | float, zero_point: Tensor | int, quant_min: int, quant_max: int) -> tuple[float, float]:
    """Return the real values of a grid's first and last integer, computed in Python floats.

    A tensor clamped to them and rounded on a wider grid of the same scale and zero point has the very
    codes of this grid; so 8-bit integers carry grids of fewer bits.

    Args:
        scale: Step of the grid, one float.
        zero_point: The integer of the real 0, one integer.
        quant_min: Smallest integer of the grid.
        quant_max: Largest integer of the grid.
    """
    step, zero = float(scale), int(zero_point)
    return (quant_min - zero) * step, (quant_max - zero) * step


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, ch_axis: int | None = None
) -> Tensor:
    """Return the integer codes of ``x`` as an int32 tensor of its shape."""
    s, z = _along(scale, x, ch_axis), _along(zero_point, x, ch_axis)
    return torch.clamp(torch.round(x / s) + z, quant_min, quant_max).to(torch.int32)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, ch_axis: int | None = None) -> Tensor:
    """Return the real values of integer codes, in ``scale``'s dtype."""
    s, z = _along(scale, q, ch_axis), _along(zero_point, q, ch_axis)
    return (q - z).to(scale.dtype) * s


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, ch_axis: int | None = None
) -> Tensor:
    """Return ``dequantize(quantize(x))`` in ``x``'s dtype; no gradient."""
    return dequantize(quantize(x, scale, zero_point, quant_min, quant_max, ch_axis), scale, zero_point, ch_axis).to(
        x.dtype
    )
