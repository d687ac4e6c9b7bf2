"""A convolution recovered from a function that can only be run: its impulse response in float64.

Whatever maps images to images, is affine, and does to a shifted image the same as to the image, is a
convolution. Here the function is run to learn its stride, its padding, its bias and its taps, and
then again on random images of several sizes and scales to learn whether that was all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from repapq_plugin.core.compare import EXACT
from repapq_plugin.core.copies import plain_copy
from repapq_plugin.core.running import is_out_of_memory
from repapq_plugin.errors import MergeError
from repapq_plugin.reparam.linear_map import LinearMap, condensed, to_conv

# A kernel that reads further than this is not looked for.
_LARGEST_IMAGE = 64
# Doubles in one batch of impulses: 32 MB.
_BATCH_NUMEL = 2**22
# Multiplications for one kernel: some ten seconds of one core.
_MOST_WORK = 3e10

Function = Callable[[Tensor], object]


class NotAffineError(MergeError):
    """A function is no convolution: not affine, not shift-invariant, or not known well enough."""


def empty_like(module: nn.Module) -> Tensor:
    """Return an empty tensor of the dtype and on the device of a module."""
    tensors = [*module.parameters(), *module.buffers()]
    return next((tensor.new_empty(0) for tensor in tensors if tensor.is_floating_point()), torch.empty(0))


class _Probe:
    """Runs the function on made-up images, the same ones every time."""

    def __init__(self, function: Function, channels: int, like: Tensor, where: str) -> None:
        self.function, self.channels, self.where = function, channels, where
        self.like = like
        self.generator = torch.Generator().manual_seed(0)

    def random(self, batch: int, height: int, width: int) -> Tensor:
        image = torch.randn(batch, self.channels, height, width, generator=self.generator, dtype=torch.float64)
        return image.to(self.like.device)

    def zeros(self, batch: int, height: int, width: int) -> Tensor:
        return torch.zeros(batch, self.channels, height, width, dtype=torch.float64, device=self.like.device)

    def __call__(self, image: Tensor) -> Tensor:
        """Run on a copy of an image; what happens to the copy is the function's own affair."""
        try:
            output = self.function(image.clone())
        except Exception as failure:
            if is_out_of_memory(failure):
                raise
            raise NotAffineError(
                f"{self.where}: cannot be run alone on a batch of images of {self.channels} channels "
                f"({type(failure).__name__}: {failure})."
            ) from failure
        if not isinstance(output, Tensor) or output.dim() != 4 or len(output) != len(image):
            raise NotAffineError(f"{self.where}: gives no batch of images.")
        if output.dtype != torch.float64 or not bool(output.isfinite().all()):
            raise NotAffineError(f"{self.where}: gives values that are not finite, or not float64 for float64.")
        return output


def _differ(actual: Tensor, wanted: Tensor, *parts: Tensor) -> bool:
    """Tell whether two results differ, relative to the largest value that took part; NaN differs from all."""
    peak = max(float(part.abs().max()) for part in (actual, wanted, *parts))
    return not float((actual - wanted).abs().max()) <= EXACT * peak


def _check_affine(run: _Probe, size: int) -> None:
    """Refuse what is not affine, at small, ordinary and large values; quick for nearly everything else."""
    x, y = run.random(1, size, size), run.random(1, size, size)
    none, fx, fy = run(torch.zeros_like(x)), run(x), run(y)
    for a, b in ((2.0, -3.0), (1e3, 1e-3), (-1e-2, 1e2)):
        ax, by = a * (fx - none), b * (fy - none)
        if _differ(run(a * x + b * y), none + ax + by, ax, by):
            raise NotAffineError(f"{run.where}: is not affine in its input.")


def _axis(sizes: list[int], outputs: list[int], where: str) -> tuple[int, int]:
    """Stride and slack of one axis, from the outputs' sizes."""
    jumps = [size for size, before, after in zip(sizes[1:], outputs, outputs[1:], strict=False) if after > before]
    if len(jumps) >= 2:
        stride = jumps[1] - jumps[0]
        slack = stride * (outputs[sizes.index(jumps[0])] - 1) - jumps[0]
        if outputs == [(size + slack) // stride + 1 for size in sizes]:
            return stride, slack
    raise NotAffineError(f"{where}: its output's size does not follow its input's as a convolution's does.")


def _geometry(run: _Probe, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    sizes = list(range(size, size + 9))
    shapes = [run(run.zeros(1, n, n)).shape[2:] for n in sizes]
    rows = _axis(sizes, [shape[0] for shape in shapes], run.where)
    cols = _axis(sizes, [shape[1] for shape in shapes], run.where)
    return (rows[0], cols[0]), (rows[1], cols[1])


def _gradient(run: _Probe, image: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.enable_grad():
        leaf = image.requires_grad_()
        value = of(run(leaf))
        if not value.requires_grad:
            raise NotAffineError(f"{run.where}: cannot be differentiated, so its taps cannot be read.")
        (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True)
        return torch.zeros_like(image) if gradient is None else gradient


def _support(run: _Probe, stride: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last tap along both axes, seen from an output far from the border."""
    size = 16
    while size <= _LARGEST_IMAGE:
        centre = [0, 0]

        def mix(output: Tensor, centre: list[int] = centre) -> Tensor:
            centre[:] = [output.shape[2] // 2, output.shape[3] // 2]
            weights = torch.randn(output.shape[1], generator=run.generator, dtype=torch.float64).to(output.device)
            return (output[0, :, centre[0], centre[1]] * weights).sum()

        touched = _gradient(run, run.zeros(1, size, size), mix)[0].abs().amax(0) > 0
        taps = [touched.any(axis).nonzero().flatten().tolist() for axis in (1, 0)]
        if not taps[0]:
            return (0, 0), (0, 0)
        if all(0 < axis[0] and axis[-1] < size - 1 for axis in taps):
            ends = [(a[0] - s * q, a[-1] - s * q) for a, s, q in zip(taps, stride, centre, strict=True)]
            return ends[0], ends[1]
        size *= 2
    raise NotAffineError(f"{run.where}: reads further than {_LARGEST_IMAGE // 2} positions.")


def _kernel(run: _Probe, linear: LinearMap, weights: int) -> Tensor:
    """Read all taps on an image just large enough: gradients of one output position."""
    at, image = [], []
    for taps, stride, slack in zip((linear.rows, linear.cols), linear.stride, linear.slack, strict=True):
        q = -(taps[0] // stride) if taps[0] < 0 else 0
        at.append(q)
        image.append(max(stride * q + taps[-1] + 1, stride * q - slack, 1))
    rows = [linear.stride[0] * at[0] + tap for tap in linear.rows]
    cols = [linear.stride[1] * at[1] + tap for tap in linear.cols]
    groups, outputs = linear.groups, linear.out_channels // linear.groups
    if 2 * weights * outputs * image[0] * image[1] > _MOST_WORK:
        raise NotAffineError(f"{run.where}: reading its {linear.weight.numel()} taps one by one would take too long.")
    numel = max(run.channels, linear.out_channels) * image[0] * image[1]
    batches = torch.split(torch.arange(outputs, device=run.like.device), max(1, min(outputs, _BATCH_NUMEL // numel)))
    parts = []
    for batch in batches:

        def picked(output: Tensor, batch: Tensor = batch) -> Tensor:
            # Channels of different groups do not meet, so one image serves one output of each group.
            position = output[:, :, at[0], at[1]].reshape(len(batch), groups, outputs)
            return position[torch.arange(len(batch), device=batch.device), :, batch].sum()

        gradient = _gradient(run, run.zeros(len(batch), image[0], image[1]), picked)
        parts.append(gradient[:, :, rows][..., cols].reshape(len(batch), groups, -1, len(rows), len(cols)))
    return torch.cat(parts).transpose(0, 1).flatten(0, 1)


def _images(run: _Probe, linear: LinearMap) -> Iterator[Tensor]:
    height, width = (
        max(taps[-1] - taps[0] + 1, -slack) + 2 * stride
        for taps, stride, slack in zip((linear.rows, linear.cols), linear.stride, linear.slack, strict=True)
    )
    yield run.random(2, height, width + 1)
    yield 1e3 * run.random(1, height + 3, width + 2)
    yield 1e-3 * run.random(3, height + 1, width + 4)


def _check_equal(run: _Probe, linear: LinearMap) -> None:
    conv = to_conv(linear, torch.float64)
    for image in _images(run, linear):
        wanted, actual = run(image), conv(image)
        if actual.shape != wanted.shape:
            raise NotAffineError(f"{run.where}: its output's size does not follow its input's.")
        if not _differ(actual, wanted):
            continue
        same = (actual - wanted).abs().amax((0, 1)) <= EXACT * wanted.abs().max()
        inside = "inside the image, but not at its border" if bool(same.any()) else "nowhere"
        raise NotAffineError(f"{run.where}: is affine, but equals its impulse response {inside}.")


@torch.no_grad()
def impulse_map(
    function: Function, channels: int, like: Tensor, where: str, *, groups: int = 1, weights: int = 0
) -> LinearMap:
    """Recover the convolution that a function is.

    Args:
        function: Takes float64 images ``[batch, channels, height, width]``, any size; differentiable.
        channels: Channels of its input.
        like: A tensor on its device.
        where: What it is, for the error text.
        groups: Number of channel groups that are taken not to meet; more groups, fewer runs.
        weights: Multiplications that one position takes, to bound the work; 0 if they do not count.

    Returns:
        A map that was seen to equal the function on random images, border included.

    Raises:
        NotAffineError: The function is no convolution with zero padding, cannot be run or
            differentiated, or is too large for it.
    """
    run = _Probe(function, channels, like, where)
    _check_affine(run, 8)
    stride, slack = _geometry(run, 8)
    constant = run(run.zeros(1, 8, 9))[0]
    bias = constant[:, 0, 0].clone()
    if _differ(constant, bias[:, None, None].expand_as(constant)):
        raise NotAffineError(f"{where}: gives an empty image a pattern, so its bias depends on the position.")
    if len(bias) % groups or channels % groups:
        groups = 1
    rows, cols = (tuple(range(low, high + 1)) for low, high in _support(run, stride))
    empty = bias.new_zeros(len(bias), channels // groups, len(rows), len(cols))
    linear = LinearMap(empty, bias, rows, cols, stride, slack, groups)
    linear = condensed(replace(linear, weight=_kernel(run, linear, weights)))
    _check_equal(run, linear)
    return linear


def whole_map(module: nn.Module, channels: int, where: str) -> LinearMap:
    """Recover the convolution that a module is, from a float64 copy of it (see `impulse_map`)."""
    lone = plain_copy(module).double()
    convs = [layer for layer in lone.modules() if isinstance(layer, nn.Conv2d)]
    groups = math.gcd(*(conv.groups for conv in convs)) if convs else 1
    weights = sum(conv.weight.numel() for conv in convs)
    return impulse_map(lone, channels, empty_like(lone), where, groups=groups, weights=weights)
