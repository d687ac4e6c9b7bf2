"""What stands where batch norms stood, and the one that is left."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MimicNorm2d(nn.Module):
    """Stands where a BatchNorm2d stood and normalises nothing: ``scale * x + bias``.

    Args:
        num_features: Number of channels.
        bias: Learn a bias per channel; false where the layer in front has one.
        scale: Starting value of one learned scalar, for the end of a residual branch; ``None`` multiplies nothing.
        **_: What configs give to batch norms (``eps``, ``momentum``, ...) and what has no meaning here.

    Shapes: ``(N, num_features, ...)`` to the same.
    """

    scale: nn.Parameter | None
    bias: nn.Parameter | None

    _abbr_ = "bn"  # mmengine names the attribute after it, so state dicts keep their keys

    def __init__(self, num_features: int, bias: bool = True, scale: float | None = None, **_: object) -> None:
        super().__init__()
        self.num_features = num_features
        self.register_parameter("scale", None if scale is None else nn.Parameter(torch.tensor([float(scale)])))
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_features)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift ``x``; the result has its dtype, as a batch norm's has under autocast."""
        if self.scale is not None:
            x = x * self.scale.to(x.dtype)
        return x if self.bias is None else x + self.bias.to(x.dtype).reshape(-1, *[1] * (x.dim() - 2))

    def inference_affine(self) -> tuple[Tensor, Tensor]:
        """Return scale and shift per channel, float64 ``[num_features]``, for merging into the layer in front."""
        some = self.bias if self.bias is not None else self.scale
        ones = torch.ones(self.num_features, dtype=torch.float64, device=None if some is None else some.device)
        scale = ones if self.scale is None else ones * self.scale.double()
        return scale, 0 * ones if self.bias is None else self.bias.double()

    def extra_repr(self) -> str:
        """Say what is learned."""
        return f"{self.num_features}, bias={self.bias is not None}, scale={self.scale is not None}"


class LastBatchNorm(nn.modules.batchnorm._BatchNorm):
    """The one batch norm, without affine parameters, behind the last layer (paper, "last BN layer").

    Takes logits ``(N, C)`` as well as maps ``(N, C, ...)``. It keeps the loss's gradient from growing with the
    weights, which tunes the learning rate by itself; at deployment it folds into the layer in front.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=False)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"LastBatchNorm takes (N, C, ...), not a tensor of shape {tuple(input.shape)}.")
