"""Batch normalisation at inference, read as one scale and one shift per channel."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn

from repapq_plugin.errors import MergeError


class _StoredNorm(Protocol):
    """What is read of a batch norm, whatever its class."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module scales and shifts each channel at inference.

    Every BatchNorm does, also synchronised or frozen, and whatever says so itself with ``inference_affine()``.
    """
    if callable(getattr(module, "inference_affine", None)):
        return True
    statistics = [getattr(module, name, None) for name in ("running_mean", "running_var")]
    stored = all(isinstance(value, Tensor) for value in statistics) and hasattr(module, "eps")
    return stored or isinstance(module, nn.modules.batchnorm._BatchNorm)


def tail_of(norm: nn.Module) -> list[nn.Module]:
    """Return what a norm applies after normalising: some carry their own drop layer and activation."""
    children = (getattr(norm, name, None) for name in ("drop", "act"))
    return [child for child in children if isinstance(child, nn.Module) and type(child) is not nn.Identity]


def has_activation(norm: nn.Module) -> bool:
    """Tell whether a norm applies an activation of its own."""
    act = getattr(norm, "act", None)
    return any(part is act for part in tail_of(norm))


@torch.no_grad()
def norm_affine(norm: nn.Module, where: str = "") -> tuple[Tensor, Tensor]:
    """Return scale and shift of a norm at inference, from its own eps.

    A channel of zero variance (and zero eps) never left its mean: its scale is 0, its output the bias.

    Args:
        norm: A module for which `is_norm` holds.
        where: Path of the norm, for the error text.

    Returns:
        Two float64 tensors of shape ``[channels]``: ``norm(x) = scale * x + shift``.

    Raises:
        MergeError: The norm keeps no statistics, or statistics or parameters are not finite.
    """
    name = where or type(norm).__name__
    affine = getattr(norm, "inference_affine", None)
    if callable(affine):
        own_scale, own_shift = cast("tuple[Tensor, Tensor]", affine())
        if not bool(own_scale.isfinite().all() & own_shift.isfinite().all()):
            raise MergeError(f"{name} holds parameters that are not finite; check the checkpoint.")
        return own_scale.double(), own_shift.double()
    stored = cast(_StoredNorm, norm)
    if stored.running_mean is None or stored.running_var is None:
        raise MergeError(f"{name} keeps no running statistics, so at inference it is not linear.")
    mean, variance = stored.running_mean.double(), stored.running_var.double() + stored.eps
    weight = torch.ones_like(mean) if stored.weight is None else stored.weight.double()
    bias = torch.zeros_like(mean) if stored.bias is None else stored.bias.double()
    if not all(bool(value.isfinite().all()) for value in (mean, variance, weight, bias)):
        raise MergeError(f"{name} holds statistics or parameters that are not finite; check the checkpoint.")
    if bool((variance < 0).any()):
        raise MergeError(f"{name} holds a negative variance; check the checkpoint.")
    scale = torch.where(variance > 0, weight / variance.sqrt(), 0.0)
    return scale, bias - mean * scale
