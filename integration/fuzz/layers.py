"""Single layers, norms and activations, drawn with the settings and the classes that users have."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from integration.fuzz.draw import Draw
from integration.traits.networks import Kind, OwnNorm
from tests.support import own_layers
from tests.support.strange_networks import FromProperty, Normalized, ReadsTwice

Shape = tuple[int, ...]
"""Channels, then the size along each axis; without the batch."""

CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, type[nn.Module]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS: dict[int, type[nn.Module]] = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE: dict[int, type[nn.Module]] = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}

OWN_2D: tuple[Callable[..., nn.Module], ...] = (
    Kind,
    own_layers.Padded,
    own_layers.Standardized,
    own_layers.Scaled,
    own_layers.Twice,
    own_layers.BiasApart,
    own_layers.FromInput,
    FromProperty,
)
"""Subclasses of `nn.Conv2d`, most with a forward of their own."""


class OwnLinear(nn.Linear):
    """Multiplies by a function, and scales in place what comes of it."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias).mul_(0.5)


class Clamped(nn.Conv2d):
    """Multiplies by its weight, clamped."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.clamp(-0.2, 0.2), self.bias)


class ByFunction(nn.Module):
    """A function that takes a parameter of the module."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(outputs, inputs) / math.sqrt(inputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nc...,dc->nd...", x, self.matrix)


def halved(layer: nn.Module) -> None:
    """Let hooks halve what a layer reads and shift what it returns."""
    layer.register_forward_pre_hook(lambda _, args: (args[0] * 0.5, *args[1:]))
    layer.register_forward_hook(lambda _, args, output: output + 0.1)


def same_size(draw: Draw, inputs: int, outputs: int, axes: int, **keys: Any) -> nn.Module:
    """Return a convolution whose output is as large as its input."""
    kernel = tuple(draw.of(1, 3, 3, 5) for _ in range(axes))
    dilation = tuple(draw.of(1, 1, 1, 2) for _ in range(axes))
    padding: Any = tuple((k - 1) * d // 2 for k, d in zip(kernel, dilation, strict=True))
    padding = "same" if draw.chance(0.1) else padding
    keys.setdefault("groups", groups_of(draw, inputs, outputs))
    return CONVOLUTIONS[axes](inputs, outputs, kernel, padding=padding, dilation=dilation, **keys)


def groups_of(draw: Draw, inputs: int, outputs: int) -> int:
    """Return a number of groups that fits both; often one, sometimes as many as there are channels."""
    common = math.gcd(inputs, outputs)
    options = [groups for groups in range(1, common + 1) if common % groups == 0]
    return draw.weighted([(1, 3.0), (draw.of(*options), 1.0), (common, 1.0)])


def convolution(draw: Draw, inputs: int, outputs: int, axes: int) -> nn.Module:
    """Return any convolution."""
    kernel = tuple(draw.of(1, 2, 3, 3, 4, 5) for _ in range(axes))
    stride = tuple(draw.of(1, 1, 2, 3) for _ in range(axes))
    keys: dict[str, Any] = {"bias": draw.chance(0.6)}
    if draw.chance(0.12):
        back = tuple(draw.whole(0, step - 1) for step in stride)
        padding = tuple(draw.whole(0, k // 2) for k in kernel)
        groups = groups_of(draw, inputs, outputs)
        made = TRANSPOSED[axes]
        return made(inputs, outputs, kernel, stride, padding, output_padding=back, groups=groups, **keys)
    keys["groups"] = groups_of(draw, inputs, outputs)
    keys["dilation"] = tuple(draw.of(1, 1, 1, 2, 3) for _ in range(axes))
    if draw.chance(0.1):
        return CONVOLUTIONS[axes](inputs, outputs, kernel, padding=draw.of("same", "valid"), **keys)
    keys["padding"] = tuple(draw.whole(0, k) for k in kernel)
    mode = draw.weighted([("zeros", 8.0), ("reflect", 1.0), ("circular", 1.0), ("replicate", 1.0)])
    made = CONVOLUTIONS[axes] if axes != 2 or draw.chance(0.75) else draw.of(*OWN_2D, Clamped)
    return made(inputs, outputs, kernel, stride, padding_mode=mode, **keys)


def layer(draw: Draw, shape: Shape) -> nn.Module:
    """Return a layer, perhaps with hooks or parametrizations, for an input of a shape."""
    axes, outputs = len(shape) - 1, draw.width()
    if axes == 0:
        made: nn.Module = draw.of(nn.Linear, nn.Linear, OwnLinear, own_layers.StandardizedLinear)(shape[0], outputs)
    elif axes == 2 and draw.chance(0.05):
        made = draw.of(ReadsTwice, Normalized)(shape[0], outputs, 3, padding=1)
    elif draw.chance(0.05):
        made = ByFunction(shape[0], outputs)
    else:
        made = convolution(draw, shape[0], outputs, axes)
    return computed(draw, made)


def computed(draw: Draw, made: nn.Module) -> nn.Module:
    """Let, now and then, something compute a layer's weight, or hooks change what it reads and returns."""
    kind = draw.weighted(
        [("", 14.0), ("weight", 1.0), ("old", 1.0), ("spectral", 1.0), ("hooks", 1.0), ("frozen", 1.0)]
    )
    if kind == "hooks":
        halved(made)
    elif kind == "frozen":
        made.requires_grad_(False)
    elif "weight" in dict(made.named_parameters(recurse=False)) and made.weight.dim() > 1:
        if kind == "weight":
            return nn.utils.parametrizations.weight_norm(made)
        if kind == "old":
            return nn.utils.weight_norm(made)
        if kind == "spectral":
            return nn.utils.parametrizations.spectral_norm(made)
    return made


def norm(draw: Draw, channels: int, axes: int) -> nn.Module:
    """Return a norm of channels: nearly always of batches, by any of its settings."""
    kind = draw.weighted([("batch", 12.0), ("group", 1.0), ("instance", 1.0), ("own", 1.0), ("layer", 0.5)])
    if kind == "group":
        return nn.GroupNorm(groups_of(draw, channels, channels), channels)
    if kind == "instance" and axes:
        return INSTANCE[axes](channels, affine=draw.chance(0.5), track_running_stats=draw.chance(0.5))
    if kind == "own" and axes == 2:
        return OwnNorm(channels)
    if kind == "layer" and not axes:
        return nn.LayerNorm(channels)
    keys: dict[str, Any] = {"eps": draw.of(1e-5, 1e-5, 1e-3, 1e-8), "affine": draw.chance(0.85)}
    keys["momentum"] = draw.of(0.1, 0.1, 0.03, None)
    keys["track_running_stats"] = not draw.chance(0.04)
    return NORMS[axes](channels, **keys)


@torch.no_grad()
def spoil(draw: Draw, made: nn.Module) -> None:
    """Give a norm, now and then, statistics and weights of a trouble that real networks have."""
    if not isinstance(made, nn.modules.batchnorm._BatchNorm) or made.running_var is None:
        return
    kind = draw.of("", "", "", "huge", "tiny", "shifted", "dead", "turned", "constant", "mixed")
    var, mean = made.running_var, made.running_mean
    index = draw.whole(0, made.num_features - 1)
    if kind == "huge":
        var.mul_(draw.of(1e2, 1e4, 1e6))
    elif kind == "tiny":
        var.mul_(draw.of(1e-2, 1e-4, 1e-12))
    elif kind == "shifted" and mean is not None:
        mean.add_(draw.of(-30.0, 10.0, 300.0))
    elif kind == "constant":
        var[index] = 0.0
    elif kind == "mixed":
        var.mul_(torch.logspace(-3, 3, made.num_features))
    elif made.weight is not None and kind == "dead":
        made.weight[index] = draw.of(0.0, 1e-30, 1e-6)
        if made.bias is not None and draw.chance(0.5):
            made.bias[index] = draw.of(0.0, -1.0, 20.0)
    elif made.weight is not None and kind == "turned":
        made.weight.mul_(draw.of(-1.0, -3.0, 10.0))


ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU,
    nn.ReLU,
    nn.ReLU,
    lambda: nn.ReLU(inplace=True),
    nn.ReLU6,
    nn.SiLU,
    nn.Hardswish,
    nn.LeakyReLU,
    nn.GELU,
    nn.Sigmoid,
    nn.Tanh,
    nn.PReLU,
    nn.ELU,
    nn.Hardtanh,
    nn.Softplus,
    lambda: nn.Hardswish(inplace=True),
    nn.Identity,
)


def activation(draw: Draw) -> nn.Module:
    """Return an activation."""
    return draw.of(*ACTIVATIONS)()
