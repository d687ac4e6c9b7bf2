"""Blocks of a few layers: branches that are merged, residuals, concatenations, gates, and what is no layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.models.byobnet import LayerFn, MobileOneBlock, RepVggBlock
from torch import Tensor, nn
from torch.nn import functional

from integration.fuzz.draw import Draw
from integration.fuzz.layers import (
    CONVOLUTIONS,
    NORMS,
    Shape,
    activation,
    computed,
    groups_of,
    layer,
    norm,
    same_size,
)
from tests.support.networks import TwoBranchBlock

LINES = ("one", "cross", "pool", "chain", "same", "large", "norm", "plain")
"""Kinds of branches beside the first."""

ODDITIES = (
    "function",
    "borrowed",
    "norm",
    "gain",
    "shuffle",
    "pool",
    "excite",
    "attention",
    "partly",
    "wrapped",
    "drop",
)
"""Kinds of parts that are no layers, or layers in an unusual place."""


class Branches(nn.Module):
    """Linear branches that are added up, weighed or subtracted, and an activation."""

    def __init__(self, branches: list[nn.Module], gains: list[float], act: nn.Module, inplace: bool) -> None:
        super().__init__()
        self.branches, self.gains, self.act, self.inplace = nn.ModuleList(branches), gains, act, inplace

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch, gain in zip(self.branches[1:], self.gains, strict=True):
            made = branch(x) if gain == 1.0 else branch(x) * gain
            total = total.add_(made) if self.inplace else total + made
        return self.act(total)


class Residual(nn.Module):
    """What a body makes, added to its input or multiplied with it."""

    def __init__(self, body: nn.Module, kind: str) -> None:
        super().__init__()
        self.body, self.kind = body, kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "in place":
            y = self.body(x)
            y += x
            return y
        if self.kind == "times":
            return x * torch.sigmoid(self.body(x))
        if self.kind == "relu":
            return functional.relu(x + self.body(x), inplace=True)
        return x + self.body(x)


class Joined(nn.Module):
    """Bodies whose outputs are concatenated."""

    def __init__(self, *bodies: nn.Module) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(bodies)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([body(x) for body in self.bodies], 1)


class Partly(nn.Module):
    """Changes the first channels and leaves the others."""

    def __init__(self, body: nn.Module, count: int) -> None:
        super().__init__()
        self.body, self.count = body, count

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.body(x[:, : self.count]), x[:, self.count :]], 1)


class Excited(nn.Module):
    """Squeeze and excite."""

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.down, self.up = CONVOLUTIONS[axes](channels, 2, 1), CONVOLUTIONS[axes](2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(tuple(range(2, x.dim())), keepdim=True)
        return x * self.up(self.down(mean).relu()).sigmoid()


class Twice(nn.Module):
    """Calls one module twice."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.body(x).clamp(-4, 4))


class Attention(nn.Module):
    """Places attend to each other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.keys, self.values = nn.Linear(channels, 2 * channels), nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        one, other = self.keys(tokens).chunk(2, -1)
        made = (one @ other.transpose(1, 2)).softmax(-1) @ self.values(tokens)
        return made.transpose(1, 2).reshape_as(x)


class Borrowed(nn.Module):
    """Uses the weight of a layer that it never calls in a function."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.layer.weight * 0.5, self.layer.bias, padding=1)


class Shuffled(nn.Module):
    """Moves channels."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


class Does(nn.Module):
    """Calls a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Gain(nn.Module):
    """Multiplies by a parameter and adds a buffer, in place of a copy."""

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(channels, *[1] * axes))
        self.register_buffer("shift", torch.randn(channels, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.gain).add_(self.shift)


def with_norm(draw: Draw, shape: Shape) -> nn.Module:
    """A layer, a norm, an activation; some of them."""
    first = layer(draw, shape)
    made = first(torch.zeros(1, *shape))
    parts = [first]
    if draw.chance(0.6):
        parts.append(norm(draw, made.shape[1], made.dim() - 2))
    if draw.chance(0.75):
        parts.append(activation(draw))
    return nn.Sequential(*parts) if len(parts) > 1 or draw.chance(0.3) else first


def body(draw: Draw, shape: Shape, outputs: int) -> nn.Module:
    """Layers that keep the size."""
    axes = len(shape) - 1
    if axes == 0:
        return nn.Sequential(nn.Linear(shape[0], 4), activation(draw), nn.Linear(4, outputs))
    parts = [computed(draw, same_size(draw, shape[0], outputs, axes, bias=draw.chance(0.5)))]
    parts += [norm(draw, outputs, axes)] if draw.chance(0.6) else []
    parts += [activation(draw)] if draw.chance(0.5) else []
    return nn.Sequential(*parts)


def branches(draw: Draw, shape: Shape) -> nn.Module:
    """A block of branches that nobody taught, of RepVGG, MobileOne, ACNet or DBB, by chance."""
    axes, inputs = len(shape) - 1, shape[0]
    outputs = inputs if draw.chance(0.6) else draw.width()
    if axes == 0:
        made = [nn.Sequential(nn.Linear(inputs, outputs, False), nn.BatchNorm1d(outputs)), nn.Linear(inputs, outputs)]
        return Branches(made, [1.0], activation(draw), False)
    groups, stride = groups_of(draw, inputs, outputs), tuple(draw.of(1, 1, 1, 2) for _ in range(axes))
    affine = {"affine": draw.chance(0.9), "eps": draw.of(1e-5, 1e-3)}

    def normed(*layers: nn.Module) -> nn.Module:
        return nn.Sequential(*layers, NORMS[axes](outputs, **affine)) if draw.chance(0.9) else nn.Sequential(*layers)

    def line(kernel: tuple[int, ...], bias: bool = False) -> nn.Module:
        padding = tuple(k // 2 for k in kernel)
        return CONVOLUTIONS[axes](inputs, outputs, kernel, stride, padding, groups=groups, bias=bias)

    made = [normed(line((3,) * axes, draw.chance(0.3)))]
    for kind in [draw.of(*LINES) for _ in range(draw.whole(1, 3))]:
        if kind == "one":
            made.append(normed(line((1,) * axes)))
        elif kind == "cross":
            made.append(normed(line((1,) * (axes - 1) + (3,))))
        elif kind == "same":
            made.append(normed(line((3,) * axes)))
        elif kind == "large":
            made.append(normed(line((5,) * axes)))
        elif kind == "chain" and groups == 1:
            first = CONVOLUTIONS[axes](inputs, outputs, 1, bias=draw.chance(0.5))
            middle = [NORMS[axes](outputs)] if draw.chance(0.5) else []
            last = CONVOLUTIONS[axes](outputs, outputs, 3, stride, draw.of(0, 1, 1), bias=False)
            made.append(normed(first, *middle, last))
        elif kind == "pool" and axes == 2:
            pool = nn.AvgPool2d(3, stride, 1, count_include_pad=draw.chance(0.7))
            made.append(normed(CONVOLUTIONS[axes](inputs, outputs, 1, bias=False), pool))
        elif inputs == outputs and set(stride) == {1}:
            made.append(NORMS[axes](inputs) if kind == "norm" else nn.Identity())
    gains = [draw.of(1.0, 1.0, 1.0, -1.0, 0.5) for _ in made[1:]]
    return Branches(made, gains, activation(draw), draw.chance(0.2))


def known(draw: Draw, shape: Shape) -> nn.Module:
    """A block of branches that is known: of timm, or taught."""
    if len(shape) != 3:
        return branches(draw, shape)
    outputs = shape[0] if draw.chance(0.5) else draw.width()
    stride = draw.of(1, 1, 2)
    kind = draw.of("taught", "repvgg", "mobileone")
    if kind == "taught":
        return TwoBranchBlock(shape[0], outputs, stride)
    layers = LayerFn()
    if kind == "repvgg":
        return RepVggBlock(shape[0], outputs, 3, stride, layers=layers)
    size, count = draw.of(None, 1), draw.whole(1, 3)
    outputs = shape[0] if size else outputs
    kernel = draw.of(1, 3, 5)
    return MobileOneBlock(shape[0], outputs, kernel, stride, group_size=size, layers=layers, num_conv_branches=count)


def residual(draw: Draw, shape: Shape) -> nn.Module:
    """A residual or a gate."""
    return Residual(body(draw, shape, shape[0]), draw.of("", "", "relu", "in place", "times"))


def joined(draw: Draw, shape: Shape) -> nn.Module:
    """Two or three bodies, concatenated; perhaps the input itself among them."""
    bodies = [body(draw, shape, draw.of(1, 2, 3)) for _ in range(draw.whole(1, 2))]
    return Joined(*bodies, nn.Identity()) if draw.chance(0.5) else Joined(*bodies, body(draw, shape, 2))


def shared(draw: Draw, shape: Shape) -> nn.Module:
    """One module called twice, or two layers of one weight."""
    if draw.chance(0.5):
        return Twice(body(draw, shape, shape[0]))
    axes, channels = len(shape) - 1, shape[0]
    one, other = (CONVOLUTIONS[axes](channels, channels, 1) if axes else nn.Linear(channels, channels) for _ in "ab")
    other.weight = one.weight
    return nn.Sequential(one, activation(draw), other, activation(draw))


def odd(draw: Draw, shape: Shape) -> nn.Module:
    """Something else than a layer, or a layer in an unusual place."""
    axes, channels = len(shape) - 1, shape[0]
    kind = draw.of(*ODDITIES)
    if kind == "norm":
        return norm(draw, channels, axes)
    if kind == "borrowed" and axes == 2:
        return Borrowed(channels)
    if kind == "gain":
        return Gain(channels, axes)
    if kind == "shuffle":
        return Shuffled(groups_of(draw, channels, channels))
    if kind == "pool" and axes == 2:
        return draw.of(nn.MaxPool2d(2, 2, ceil_mode=draw.chance(0.3)), nn.AvgPool2d(3, 1, 1), nn.AdaptiveAvgPool2d(2))
    if kind == "excite" and axes:
        return Excited(channels, axes)
    if kind == "attention" and axes:
        return Attention(channels)
    if kind == "partly" and channels > 1:
        return Partly(body(draw, (channels - 1, *shape[1:]), 2), channels - 1)
    if kind == "wrapped":
        return nn.DataParallel(body(draw, shape, 2))
    if kind == "drop":
        return nn.Dropout(0.3)
    if kind == "function" and axes == 2 and draw.chance(0.2):
        return nn.Upsample(scale_factor=2, mode=draw.of("nearest", "bilinear"))
    return Does(draw.of(*FUNCTIONS))


FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.abs,
    lambda x: x.clamp(-1, 1),
    lambda x: x * 2 - 0.5,
    lambda x: x.relu_(),
    lambda x: x.flip(1),
    lambda x: x.mul_(0.5),
    lambda x: functional.pad(x, (1, 2)) if x.dim() > 2 else x,
    lambda x: x[..., ::2] if x.dim() > 2 and x.shape[-1] > 1 else x,
    lambda x: x - x.mean(1, keepdim=True),
    lambda x: functional.leaky_relu(x, 0.2, inplace=True),
    lambda x: x.softmax(1),
    lambda x: torch.cat([x, -x], 1),
    lambda x: x.contiguous(),
    lambda x: x.detach(),
    lambda x: torch.where(x > 0, x, 0.1 * x),
    lambda x: x + 100.0,
    lambda x: x * 1e-4,
    lambda x: torch.stack(x.unbind(1), 1),
)

BLOCKS: list[tuple[Callable[[Draw, Shape], nn.Module], float]] = [
    (with_norm, 5.0),
    (branches, 2.5),
    (known, 1.5),
    (residual, 2.0),
    (joined, 1.0),
    (shared, 1.0),
    (odd, 2.0),
]
"""What makes a part of a network, and how often."""
