"""How far apart two results are, and whether that is close enough."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDING = 1e-4
"""What two float32 runs of one function may differ by, relative to the largest output: they differ by about 1e-6."""

EXACT = 1e-9
"""The same for two runs in float64."""


def _apart(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Return the largest ``|one - other|`` and the largest ``|other|``; both infinite where they cannot be compared."""
    if one.shape != other.shape:
        return math.inf, math.inf
    if other.numel() == 0:
        return 0.0, 0.0
    reference = other.detach().to("cpu", torch.float64)
    difference = float((one.detach().to("cpu", torch.float64) - reference).abs().max())
    peak = float(reference.abs().max())
    return (difference, peak) if math.isfinite(difference) and math.isfinite(peak) else (math.inf, math.inf)


def relative_error(actual: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return ``max |actual - wanted| / max |wanted|``, in float64, the largest over all tensors.

    Infinite where shapes or numbers of tensors differ or a value is not finite; for an all-zero tensor the
    difference itself; tensors without elements are equal.
    """
    if len(actual) != len(wanted):
        return math.inf
    worst = 0.0
    for one, other in zip(actual, wanted, strict=True):
        difference, peak = _apart(one, other)
        if math.isinf(difference):
            return math.inf
        worst = max(worst, difference / peak if peak > 0 else difference)
    return worst


def equal_within(actual: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float = ROUNDING) -> bool:
    """Whether no tensor differs by more than ``tolerance`` times its largest wanted value.

    An all-zero tensor has to be met exactly. False where shapes or numbers of tensors differ or a value is not finite.
    """
    if len(actual) != len(wanted):
        return False
    pairs = (_apart(one, other) for one, other in zip(actual, wanted, strict=True))
    return all(math.isfinite(difference) and difference <= tolerance * peak for difference, peak in pairs)
