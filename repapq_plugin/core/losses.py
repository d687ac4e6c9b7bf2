"""Reconstruction losses, each a mean over all elements."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def mae_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error (paper, abstract: in place of MSE, so that outliers weigh less)."""
    return (output - target).abs().mean()


def mse_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error, the measure of earlier methods, for comparison."""
    return (output - target).square().mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mae": mae_loss, "mse": mse_loss}


def magnitude(target: Tensor, loss: str) -> Tensor:
    """Return the loss of an all-zero output, by which a loss is divided to make it relative.

    Relative terms of units of different magnitude can be added (our choice).
    """
    return LOSSES[loss](target, target.new_zeros(())).clamp_min(1e-12)
