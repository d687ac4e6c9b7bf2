"""Rounding to a grid, with gradients for the values and for the scale.

torch has kernels for it (``_fake_quantize_learnable_per_tensor_affine`` and ``..._per_channel_affine``). They give the
same values, bit for bit. Ours are used because theirs read the scale on the host in every call, which stalls an
accelerator; cut the fraction of negative codes off where gradients are decided, so that one step too low learns and the
last one does not; and take three times as long on a processor (our measurement, one thread: forward and backward of
32 x 64 x 28 x 28 values 17 and 5 ms), because their loops are not vectorized. Here each pass is one of those that are:
comparisons, masks and bounds that are tensors are not.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

INSIDE = 0.501
"""Rounding errors up to so many steps are taken for those of values inside the grid: half a step, and float32's own."""

BLOCK = 65536
"""How many values a processor takes through all passes at a time: they stay in its cache, which halves the time."""


def round_to_grid(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, ch_axis: int | None = None
) -> Tensor:
    """Return ``(clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale``, float32.

    Gradients pass straight through to values inside the grid; the scale's is that of learned step sizes (LSQ,
    arXiv:1902.08153).

    Args:
        x: float32, any shape.
        scale: float32, ``(1,)``, or ``(channels,)`` with ``ch_axis``.
        zero_point: Integers in float32, of the scale's shape.
        quant_min: Smallest integer of the grid.
        quant_max: Largest integer of the grid.
        ch_axis: The axis along which slices have a scale of their own.
    """
    if ch_axis is not None:
        shape = [1] * x.dim()
        shape[ch_axis] = -1
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    learns = torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad)
    # An exported graph learns nothing, and should hold operations that any tool knows.
    if learns and not getattr(torch.compiler, "is_exporting", bool)():
        rounded = _RoundToGrid.apply(x, scale, zero_point, quant_min, quant_max)  # type: ignore[no-untyped-call]
        return cast(Tensor, rounded)
    return _rounded(x, scale, zero_point, quant_min, quant_max)


def _rounded(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    # In this order, and with the inverse of the scale, as torch's kernels do.
    codes = (x * scale.reciprocal()).round_().add_(zero_point).clamp_(quant_min, quant_max)
    return codes.sub_(zero_point).mul_(scale)


class _RoundToGrid(torch.autograd.Function):
    """See `round_to_grid`; scale and zero point broadcast."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
    ) -> Tensor:
        """Round, and keep what the layers around keep anyway."""
        hat = _rounded(x, scale, zero_point, quant_min, quant_max)
        ctx.save_for_backward(x, hat, scale)
        return hat

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of values and scale."""
        x, hat, scale = cast("tuple[Tensor, ...]", ctx.saved_tensors)  # type: ignore[attr-defined]
        of_x, of_scale = (_per_tensor if scale.numel() == 1 else _per_channel)(gradients[0], x, hat, scale)
        return of_x, of_scale, None, None, None


def _inside(gradient: Tensor, errors: Tensor) -> Tensor:
    """Return the gradient where values lie inside the grid, else 0; the errors are in steps."""
    # hardtanh's own backward is the one vectorized pass that keeps a gradient between two bounds.
    return cast(Tensor, torch.ops.aten.hardtanh_backward(gradient, errors, -INSIDE, INSIDE))


# Inside the grid the scale moves the rounding error, outside its end. What is outside is a difference of two sums that
# are equal to the last bit where nothing is.
def _per_channel(gradient: Tensor, x: Tensor, hat: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    errors = (hat - x) / scale
    of_x = _inside(gradient, errors)
    products = of_x * errors + (gradient - of_x) * hat / scale
    return of_x, products.sum([axis for axis in range(x.dim()) if scale.shape[axis] == 1], keepdim=True)


def _per_tensor(gradient: Tensor, x: Tensor, hat: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    values, ends, given = (tensor.reshape(-1) for tensor in (x, hat, gradient))
    # The only channel of a layer comes with a scale of as many axes as its weight.
    inverse = scale.reshape(1).reciprocal()
    of_x, total = torch.empty_like(values), torch.zeros_like(inverse)
    block = BLOCK if x.device.type == "cpu" else max(values.numel(), 1)
    for start in range(0, values.numel(), block):
        part = slice(start, start + block)
        errors = (ends[part] - values[part]).mul_(inverse)
        kept = of_x[part].copy_(_inside(given[part], errors))
        outside = torch.dot(given[part], ends[part]) - torch.dot(kept, ends[part])
        total += torch.dot(kept, errors) + outside * inverse
    return of_x.view(x.shape), total.view(scale.shape)
