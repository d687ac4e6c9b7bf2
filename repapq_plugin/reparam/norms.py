"""Batch normalisation at inference, read as one scale and one shift per channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from repapq_plugin.core.compare import EXACT
from repapq_plugin.core.copies import plain_copy
from repapq_plugin.core.modules import own_class, without_hooks
from repapq_plugin.core.running import inference, is_out_of_memory
from repapq_plugin.errors import MergeError

Affine = tuple[Tensor, Tensor]
"""Scale and shift of each channel, float64 ``[channels]``."""


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module scales and shifts each channel at inference.

    Every BatchNorm does, also synchronised or frozen, and whatever says so itself with ``inference_affine()``.
    """
    if callable(getattr(module, "inference_affine", None)):
        return True
    return _statistics(module) is not None or isinstance(module, nn.modules.batchnorm._BatchNorm)


def _statistics(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    mean, variance = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    return (mean, variance) if isinstance(mean, Tensor) and isinstance(variance, Tensor) else None


def tail_of(norm: nn.Module) -> list[nn.Module]:
    """Return what a norm applies after normalising: some carry their own drop layer and activation."""
    children = (getattr(norm, name, None) for name in ("drop", "act"))
    return [child for child in children if isinstance(child, nn.Module) and type(child) is not nn.Identity]


def has_activation(norm: nn.Module) -> bool:
    """Tell whether a norm applies an activation of its own."""
    act = getattr(norm, "act", None)
    return any(part is act for part in tail_of(norm))


@torch.no_grad()
def norm_affine(norm: nn.Module, where: str = "") -> Affine:
    """Return scale and shift of a norm at inference, from its own eps.

    A norm with a forward that is not torch's is run as well, and counts as what it computes. A channel of zero variance
    (and zero eps) never left its mean: its scale is 0, its output the bias.

    Args:
        norm: A module for which `is_norm` holds.
        where: Path of the norm, for the error text.

    Returns:
        Two float64 tensors of shape ``[channels]``: ``norm(x) = scale * x + shift``.

    Raises:
        MergeError: The norm keeps no statistics, statistics or parameters are not finite, or what it computes is not
            one scale and one shift of each channel.
    """
    name = where or type(norm).__name__
    affine = getattr(norm, "inference_affine", None)
    if callable(affine):
        own_scale, own_shift = cast(Affine, affine())
        if not bool(own_scale.isfinite().all() & own_shift.isfinite().all()):
            raise MergeError(f"{name} holds parameters that are not finite; check the checkpoint.")
        return own_scale.double(), own_shift.double()
    statistics = _statistics(norm)
    if statistics is None:
        raise MergeError(f"{name} keeps no running statistics, so at inference it is not linear.")
    written = _from_attributes(norm, statistics, name)
    if tail_of(norm) or own_class(norm).__module__.startswith("torch.nn.") and "forward" not in vars(norm):
        computed = None
    else:
        computed = _from_a_run(norm, statistics[0], name)
    if written is not None and (computed is None or _agree(written, computed)):
        return written
    if computed is None:
        raise MergeError(f"{name} has no scale, shift or eps that can be read, and cannot be run alone.")
    return computed


def _from_attributes(norm: nn.Module, statistics: tuple[Tensor, Tensor], name: str) -> Affine | None:
    """Compute scale and shift from what a norm stores; None if something is missing or of another kind."""
    eps, parameters = getattr(norm, "eps", None), [getattr(norm, key, None) for key in ("weight", "bias")]
    if not isinstance(eps, float | int) or not all(value is None or isinstance(value, Tensor) for value in parameters):
        return None
    mean, variance = statistics[0].double(), statistics[1].double() + eps
    weight, bias = (
        torch.full_like(mean, default) if value is None else value.double()
        for value, default in zip(parameters, (1.0, 0.0), strict=True)
    )
    if not all(bool(value.isfinite().all()) for value in (mean, variance, weight, bias)):
        raise MergeError(f"{name} holds statistics or parameters that are not finite; check the checkpoint.")
    if bool((variance < 0).any()):
        raise MergeError(f"{name} holds a negative variance; check the checkpoint.")
    scale = torch.where(variance > 0, weight / variance.sqrt(), 0.0)
    return scale, bias - mean * scale


def _from_a_run(norm: nn.Module, mean: Tensor, name: str) -> Affine | None:
    """Read scale and shift off runs of a float64 copy; None if it cannot be run, or gives values that are not finite.

    Raises:
        MergeError: What it computes is something else.
    """
    lone = plain_copy(without_hooks(norm)).double()
    generator = torch.Generator().manual_seed(0)
    for positions in (2, 0, 1, 3):
        noise = torch.randn(3, mean.numel(), *[2] * positions, generator=generator, dtype=torch.float64).to(mean.device)
        images = [torch.zeros_like(noise), torch.ones_like(noise), noise, 100 * noise]
        try:
            with inference(lone):
                given = [cast(Tensor, lone(image.clone())) for image in images]
            known = all(y.shape == noise.shape and y.dtype == noise.dtype and bool(y.isfinite().all()) for y in given)
        except Exception as failure:  # whatever the user's forward raises
            if is_out_of_memory(failure):
                raise
            continue
        if not known:
            continue
        first = [y.movedim(1, -1).reshape(-1, mean.numel())[0] for y in given]
        scale, shift = first[1] - first[0], first[0]
        shape = (-1, *[1] * positions)
        for image, y in zip(images, given, strict=True):
            parts = scale.reshape(shape) * image, shift.reshape(shape).expand_as(image)
            peak = max(float(part.abs().max()) for part in (y, *parts))
            if not float((y - parts[0] - parts[1]).abs().max()) <= EXACT * peak:
                raise MergeError(f"{name} computes something else than one scale and one shift of each channel.")
        return scale, shift
    return None


def _agree(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    peak = max(float(value.abs().max()) for value in (*one, *other))
    return all(float((a - b.to(a.device)).abs().max()) <= EXACT * peak for a, b in zip(one, other, strict=True))
