"""Images, errors, and norms as awkward as training can leave them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn


def set_norms(model: nn.Module, seed: int, low: float = -12, high: float = 4, mean: float = 100) -> None:
    """Give every norm its own eps, variances of 10^low..10^high, means of +-mean, gammas of any sign or 0."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.rand, generator=generator)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats:
            channels = norm.num_features
            norm.eps = 10 ** float(-8 + 6 * draw(1))
            with torch.no_grad():
                norm.running_var.copy_(10 ** (low + (high - low) * draw(channels)))
                norm.running_mean.copy_(mean * (2 * draw(channels) - 1))
                norm.weight.copy_((4 * draw(channels) - 2) * (draw(channels) > 0.2))
                norm.bias.copy_(4 * draw(channels) - 2)


def random_input(channels: int, seed: int = 0, size: tuple[int, int] = (11, 9)) -> Tensor:
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative_error(actual: Tensor, wanted: Tensor) -> float:
    """Largest difference relative to the largest wanted value."""
    assert actual.shape == wanted.shape
    peak = max(float(wanted.detach().abs().max()), 1e-30)
    return float((actual.double() - wanted.double()).detach().abs().max()) / peak
