"""Layers of users, with forwards of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Padded(nn.Conv2d):
    """Pads as much as the size of its input asks for, more behind than in front (TensorFlow's "SAME")."""

    def padded(self, x: Tensor) -> Tensor:
        """Return the padded input."""
        sides: list[int] = []
        for size, kernel, stride, dilation in zip(
            x.shape[:-3:-1], self.kernel_size[::-1], self.stride[::-1], self.dilation[::-1], strict=True
        ):
            total = max(((size - 1) // stride) * stride + (kernel - 1) * dilation + 1 - size, 0)
            sides += [total // 2, total - total // 2]
        return functional.pad(x, sides)

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(self.padded(x), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def standardized(weight: Tensor) -> Tensor:
    """Return a weight whose outputs' weights have mean 0 and a standard deviation of 0.1."""
    flat = weight.flatten(1)
    shape = (-1, *[1] * (weight.dim() - 1))
    return 0.1 * (weight - flat.mean(1).reshape(shape)) / (flat.std(1) + 1e-5).reshape(shape)


class Standardized(nn.Conv2d):
    """Weight standardization."""

    def made(self) -> Tensor:
        """Return what it multiplies."""
        return standardized(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.made(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class StandardizedLinear(nn.Linear):
    """Weight standardization of a linear layer, called by keywords."""

    def made(self) -> Tensor:
        """Return what it multiplies."""
        return standardized(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, weight=self.made(), bias=self.bias)


class Scaled(nn.Conv2d):
    """A gain of its own per output channel, and torch's convolution."""

    def __init__(self, *args: int, **keys: int) -> None:
        super().__init__(*args, **keys)
        self.gain = nn.Parameter(torch.linspace(0.5, 2, self.out_channels).reshape(-1, 1, 1, 1))

    def made(self) -> Tensor:
        """Return what it multiplies."""
        return self.weight * self.gain

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.made(), self.bias)


class Twice(nn.Conv2d):
    """Two products with one weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(-x).relu()


class ByMatmul(nn.Linear):
    """A product that is no call of a layer's function."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.bias


class Gated(nn.Linear):
    """A layer's function and another product."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.matmul(y, y.transpose(-1, -2))


class BiasApart(nn.Conv2d):
    """Adds its bias after the product."""

    def forward(self, x: Tensor) -> Tensor:
        y = self._conv_forward(x, self.weight, None)
        return y if self.bias is None else y + self.bias.reshape(-1, 1, 1)


class FixedBias(nn.Conv2d):
    """Refuses to have a bias."""

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            raise ValueError("this layer has no bias")
        return super().forward(x)


class FromInput(nn.Conv2d):
    """Makes its weight from its input."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * (1 + x.mean().tanh()), self.bias)


class OtherEachTime(nn.Conv2d):
    """Makes another weight in each call."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * torch.rand(()), self.bias)
