"""How far apart two results are, and whether that is close enough."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

ROUNDING = 1e-4
"""What two float32 runs of one function may differ by, relative to the largest output: they differ by about 1e-6."""

EXACT = 1e-9
"""The same for two runs in float64."""

HALF_ROUNDING = 0.05
"""The same for two runs in float16 or bfloat16, whose roundings add up over many layers (our choice)."""


def rounding_of(tensors: Iterable[Tensor]) -> float:
    """Return what two runs that compute with such tensors may differ by: the coarsest floating dtype decides."""
    coarsest = max((torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()), default=0.0)
    return ROUNDING if coarsest <= torch.finfo(torch.float32).eps else HALF_ROUNDING


@contextmanager
def precise() -> Iterator[None]:
    """Multiply float32 as float32 inside, and not as TF32 or bfloat16; the settings come back afterwards.

    Two results that are to be equal differ by 1e-3 where one of them was computed with ten bits of mantissa.
    """
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    # From torch 2.9 on each operator has a setting of its own, and the older switches cannot be read once such a one
    # was set; up to then there are none but the switches.
    single = [(s, s.fp32_precision) for s in _settings_by_operator() if hasattr(s, "fp32_precision")]
    try:
        switches = (torch.get_float32_matmul_precision(), cuda.allow_tf32, cudnn.allow_tf32)
    except RuntimeError:
        switches = None
    try:
        if switches is not None:
            torch.set_float32_matmul_precision("highest")
            cuda.allow_tf32 = cudnn.allow_tf32 = False
        else:
            for setting, _ in single:
                setting.fp32_precision = "ieee"
        yield
    finally:
        if switches is not None:
            cuda.allow_tf32, cudnn.allow_tf32 = switches[1:]
            # Last, as the other switch knows two of its three values.
            torch.set_float32_matmul_precision(switches[0])
        for setting, before in single:
            setting.fp32_precision = before


def _settings_by_operator() -> list[object]:
    owners = (torch.backends.cuda, torch.backends.cudnn, getattr(torch.backends, "mkldnn", None))
    found = (getattr(owner, name, None) for owner in owners for name in ("matmul", "conv", "rnn"))
    return [setting for setting in found if setting is not None]


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


def equal_within(
    actual: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float = ROUNDING, *, terms: float = 0.0
) -> bool:
    """Whether no tensor differs by more than ``tolerance`` times its largest wanted value.

    An all-zero tensor has to be met exactly. False where shapes or numbers of tensors differ or a value is not finite.

    Args:
        actual: What was computed.
        wanted: What it is to be.
        tolerance: The share.
        terms: Largest magnitude of what was added up: sums that nearly cancel are no better than their terms.
    """
    if len(actual) != len(wanted):
        return False
    pairs = (_apart(one, other) for one, other in zip(actual, wanted, strict=True))
    return all(math.isfinite(difference) and difference <= tolerance * max(peak, terms) for difference, peak in pairs)
