"""A convolution or linear layer that carries its quantizers, and during calibration QPR's affine."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize

QUANTIZABLE = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
"""Layers that are quantized: those an integer runtime has kernels for."""


def output_channels_axis(layer: nn.Module) -> int:
    """Return the axis of a weight along which output channels lie (1 for transposed convolutions)."""
    return 1 if isinstance(layer, nn.ConvTranspose2d) else 0


class ChannelAffine(nn.Module):
    """``y = gamma * x + beta`` per output channel, QPR's layer behind the merged convolution.

    Starts as the identity. ``gamma`` and ``beta`` are float ``(channels,)``; ``x`` is
    ``(..., channels, H, W)``, or ``(..., channels)`` behind a linear layer.
    """

    def __init__(self, channels: int, channels_last: bool, like: Tensor) -> None:
        super().__init__()
        self.channels_last = channels_last
        self.gamma = nn.Parameter(torch.ones(channels, dtype=like.dtype, device=like.device))
        self.beta = nn.Parameter(torch.zeros(channels, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift each channel of ``x``."""
        if self.channels_last:
            return self.gamma * x + self.beta
        return self.gamma.reshape(-1, 1, 1) * x + self.beta.reshape(-1, 1, 1)


class QuantizedLayer(nn.Module):
    """``affine(layer(input_fake_quant(x); weight_fake_quant(weight)))``.

    Stands where the float layer stood. ``input_fake_quant`` may be shared with other layers that
    read the same tensor. After the fold ``affine`` is ``None`` and the weights lie on their grid.

    Args:
        layer: The float layer, adopted as it is (its weight and bias go on learning).
        weight_fake_quant: Quantizer of the weight; per channel along the output axis, or per tensor.
        input_fake_quant: Per-tensor quantizer of the input.
    """

    affine: ChannelAffine | None

    def __init__(
        self,
        layer: nn.Module,
        weight_fake_quant: LearnableFakeQuantize,
        input_fake_quant: LearnableFakeQuantize,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.weight_fake_quant = weight_fake_quant
        self.input_fake_quant = input_fake_quant
        self.affine = None

    @property
    def weight(self) -> Tensor:
        """The layer's weight, float; on its grid after the fold."""
        return cast(Tensor, self.layer.weight)

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias, float ``(channels,)`` or ``None``."""
        return cast("Tensor | None", self.layer.bias)

    @property
    def out_channels(self) -> int:
        """Number of output channels (output features of a linear layer)."""
        if isinstance(self.layer, nn.Linear):
            return self.layer.out_features
        return cast(nn.Conv2d, self.layer).out_channels

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Run the layer on the quantized input with quantized weights."""
        x = self.input_fake_quant(x)
        y = apply_layer(self.layer, x, self.weight_fake_quant(self.weight), output_size)
        return y if self.affine is None else self.affine(y)


def apply_layer(layer: nn.Module, x: Tensor, weight: Tensor, output_size: list[int] | None = None) -> Tensor:
    """Run ``layer`` on ``x`` with another weight of the same shape."""
    bias = cast("Tensor | None", layer.bias)
    if isinstance(layer, nn.Linear):
        return functional.linear(x, weight, bias)
    if isinstance(layer, nn.ConvTranspose2d):
        extra = layer._output_padding(
            x,
            output_size,
            list(layer.stride),
            list(layer.padding),  # type: ignore[arg-type]
            list(layer.kernel_size),
            2,
            list(layer.dilation),
        )
        return functional.conv_transpose2d(
            x,
            weight,
            bias,
            layer.stride,
            layer.padding,  # type: ignore[arg-type]
            extra,
            layer.groups,
            layer.dilation,
        )
    conv = cast(nn.Conv2d, layer)
    return cast(Tensor, conv._conv_forward(x, weight, bias))
