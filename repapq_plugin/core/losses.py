"""Reconstruction losses, each a mean over all elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def mae_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error (paper, abstract: in place of MSE, so that outliers weigh less)."""
    return (output - target).abs().mean()


def mse_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error, the measure of earlier methods, for comparison."""
    return (output - target).square().mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mae": mae_loss, "mse": mse_loss}


QUIET = 1e-4
"""Share of the mean size below which no sample's own size counts: what is nearly zero has no relative error."""


@dataclass(frozen=True)
class Alike:
    """What lets samples that lie on several ranks count alike.

    Args:
        floor: Size below which no sample's own counts, from the samples of all ranks; see `sample_floor`.
        samples: How many samples all ranks have together.
    """

    floor: float
    samples: int

    @classmethod
    def of(cls, sizes: Sequence[Tensor]) -> Alike:
        """Return it from the sizes of the samples of each rank, ``(samples,)`` each."""
        together = torch.cat([each.cpu() for each in sizes]) if sizes else torch.zeros(0)
        return cls(float(floor_of(together)) if together.numel() else 0.0, together.numel())


def relative_loss(output: Tensor, target: Tensor, loss: str, alike: Alike | None = None) -> Tensor:
    """Return the mean over samples of a loss, each divided by what an all-zero output would lose: a scalar.

    Relative terms of units of different magnitude can be added. That each sample is divided by its own magnitude is our
    choice, too: in a MobileOne-S1 trained on photographs, one image in a hundred is 60 times as large as the others
    behind the third stage, and 3,600 times in squares; it alone would be learned from. Samples below the median are
    divided by the median, so that quiet ones do not grow loud.

    Args:
        output: ``(samples, ...)``; a tensor without such an axis is one sample.
        target: The same shape.
        loss: ``"mae"`` or ``"mse"``.
        alike: Set where other ranks have more samples: the sum of what all return is the mean over all samples.
    """
    if alike is not None:
        magnitudes = sample_sizes(target, loss).clamp_min(alike.floor)
        return (sample_sizes(output - target, loss) / magnitudes).sum() / alike.samples
    return (sample_sizes(output - target, loss) / sample_magnitudes(target, loss)).mean()


def sample_magnitudes(target: Tensor, loss: str) -> Tensor:
    """Return by what the error of each sample is divided to be relative, float ``(samples,)``, positive."""
    return sample_floor(sample_sizes(target, loss))


def sample_floor(sizes: Tensor) -> Tensor:
    """Return the sizes of samples, ``(samples,)``, with none below their median or next to nothing."""
    return torch.maximum(sizes, floor_of(sizes))


def floor_of(sizes: Tensor) -> Tensor:
    """Return the size below which none of samples counts, a scalar, from the sizes of all, ``(samples,)``."""
    return torch.maximum(sizes.median(), QUIET * sizes.mean()).clamp_min(1e-12)


def sample_sizes(values: Tensor, loss: str) -> Tensor:
    """Return the mean of each sample as the loss measures it, float ``(samples,)``."""
    samples = values.flatten(1) if values.dim() > 1 else values.reshape(1, -1)
    # Norms are one pass, and one more for their gradient.
    norms: Tensor = torch.linalg.vector_norm(samples, ord=1 if loss == "mae" else 2, dim=1)
    return (norms if loss == "mae" else norms.square()) / samples.shape[1]
