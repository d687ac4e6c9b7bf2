"""Solved weights: the integers with which a layer comes closest to what it computed in the float network.

A merged kernel holds its identity branch as one weight that is many times the others: on the RepVGG-A0 at 6 bits a
step of the grid is as large as a typical weight, and rounding each weight to the nearest integer adds up to 40 % of
squared error over 14 layers. What a layer computes is linear in its weights, so the best real weights for the inputs
that it really reads (those of the quantized network, for the outputs of the float one) are those of a least-squares
problem, and column after column can be rounded while the columns behind make up for the error.

Source: rounding with compensation is GPTQ (arXiv:2210.17323), the target that knows the inputs' own error is GPTAQ's
(arXiv:2504.02692). Means are matched exactly by the bias; that, and the limits below, are our choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from repapq_plugin.core import ranks
from repapq_plugin.core.hooks import Hooks
from repapq_plugin.core.losses import sample_floor
from repapq_plugin.core.running import is_out_of_memory
from repapq_plugin.core.watch import FunctionWatch
from repapq_plugin.method.sites import Quantizer

DAMPING = 0.01
"""Share of the mean power of the inputs that is added to each, as GPTQ does: at 0.1 the RepVGG-A0's longest stage ends
with 10 % more error, at 0.001 with as much."""

MAX_INPUTS = 6144
"""Inputs of one output channel, kernel positions included, up to which the problem is solved: its matrix is dense."""

POSITIONS = 2048
"""Output positions of a batch that are looked at; neighbours tell little new."""

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
PRODUCTS: Mapping[str, tuple[str, ...]] = {
    "linear": ("input", "weight", "bias"),
    "conv1d": _CONVOLUTION,
    "conv2d": _CONVOLUTION,
    "conv3d": _CONVOLUTION,
}
"""Functions whose weight can be solved for, and the names of their arguments."""


def patches(name: str, call: Mapping[str, Any]) -> Tensor:
    """Return what each output position of a product multiplies with its weight, ``(groups, inputs, positions)``.

    Args:
        name: One of `PRODUCTS`.
        call: Its arguments by name.
    """
    x: Tensor = call["input"].detach()
    if name == "linear":
        return x.reshape(1, -1, x.shape[-1]).transpose(1, 2)
    axes = call["weight"].dim() - 2
    kernel = call["weight"].shape[2:]
    stride, dilation = (_each(call.get(key, 1), axes) for key in ("stride", "dilation"))
    groups = call.get("groups", 1)
    x = functional.pad(x, _pads(call.get("padding", 0), kernel, dilation))
    for axis in range(axes):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        x = x.unfold(2 + axis, reach, stride[axis])[..., :: dilation[axis]]
    # (N, C, *positions, *kernel) -> (groups, C / groups * kernel, N * positions)
    x = x.movedim(1, 0).flatten(1, 1 + axes).flatten(2).transpose(1, 2)
    return x.reshape(groups, -1, x.shape[-1])


def _each(value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def _pads(padding: str | int | tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
    """Return what `functional.pad` takes: last axis first, before and behind."""
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        both = [(total // 2, total - total // 2) for total in totals]
    else:
        both = [(p, p) for p in _each(0 if padding == "valid" else padding, len(kernel))]  # type: ignore[arg-type]
    return [pad for pair in reversed(both) for pad in pair]


class ProductInputs(FunctionWatch):
    """Collects `patches` of the products that one layer makes, call after call, inside a ``with`` block.

    Args:
        layer: The layer, float or with a quantizer of its input.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.found: list[Seen] = []
        self._layer, self._inside, self._hooks = layer, False, Hooks()

    def after(
        self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object], result: object, note: object
    ) -> None:
        """Take the patches of a product with the layer's weight."""
        if not self._inside or name not in PRODUCTS:
            return
        call = {**dict(zip(PRODUCTS[name], args, strict=False)), **kwargs}
        weight, own = call.get("weight"), self._layer.weight
        if isinstance(weight, Tensor) and isinstance(own, Tensor) and weight.shape == own.shape:
            with torch.no_grad():
                self.found.append(_thinned(name, call))

    def __enter__(self) -> ProductInputs:
        self._hooks.before(self._layer, lambda *_: setattr(self, "_inside", True))
        self._hooks.after(self._layer, lambda *_: setattr(self, "_inside", False))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.__exit__(*error)


@dataclass(frozen=True)
class Seen:
    """What a product reads: `patches` at some positions, and to which sample each of them belongs, ``(positions,)``."""

    values: Tensor
    samples: Tensor


def _thinned(name: str, call: Mapping[str, Any]) -> Seen:
    """Return what a call reads at no more than `POSITIONS` positions, spread evenly over it."""
    x = call["input"]
    if name != "linear":
        x = x if x.dim() == call["weight"].dim() else x[None]
        # Whole images first: all patches of a large batch would not fit.
        images = max(1, 8 * POSITIONS // max(1, x[0, 0].numel()))
        x = x[:: max(1, -(-len(x) // images))]
    found = patches(name, {**call, "input": x})
    positions = found.shape[-1]
    chosen = torch.arange(positions, device=found.device)
    if positions > POSITIONS:
        chosen = torch.linspace(0, positions - 1, POSITIONS, dtype=torch.float64).round().long().to(found.device)
    samples = len(x) if x.dim() > 1 else 1
    return Seen(found[..., chosen], chosen // max(1, positions // max(1, samples)))


def _weights(wanted: Seen) -> Tensor:
    """Return how much each position counts, float ``(positions,)``: every sample of the batch alike."""
    sizes = wanted.values.float().square().mean((0, 1))
    number = int(wanted.samples.max()) + 1
    ones = torch.zeros(number, device=sizes.device).index_add_(0, wanted.samples, torch.ones_like(sizes))
    means = torch.zeros(number, device=sizes.device).index_add_(0, wanted.samples, sizes) / ones.clamp_min(1)
    return 1 / sample_floor(means)[wanted.samples]


@dataclass
class Moments:
    """First and second moments of what a product reads in both networks, float64, summed over positions.

    Each sample counts alike, as in `core.losses.relative_loss`.

    Args:
        count: Sum of the positions' weights.
        read: Sum of the quantized network's inputs, ``(groups, inputs)``.
        wanted: Sum of the float network's inputs.
        square: Sum of products of the quantized network's inputs, ``(groups, inputs, inputs)``.
        cross: Sum of products of the float network's inputs with those.
    """

    count: float
    read: Tensor
    wanted: Tensor
    square: Tensor
    cross: Tensor

    @classmethod
    def of(cls, pairs: Iterable[tuple[Seen, Seen]]) -> Moments | None:
        """Return the moments of what pairs of calls read, quantized and float; ``None`` where there is no position."""
        total: Moments | None = None
        for seen, target in pairs:
            if not len(seen.samples):
                continue
            weights = _weights(target)
            read, wanted = (each.values.float() * weights.sqrt() for each in (seen, target))
            new = cls(
                float(weights.double().sum()),
                (read * weights.sqrt()).double().sum(-1),
                (wanted * weights.sqrt()).double().sum(-1),
                (read @ read.transpose(1, 2)).double(),
                (wanted @ read.transpose(1, 2)).double(),
            )
            total = new if total is None else total + new
        return total

    @classmethod
    def over_ranks(cls, mine: Moments | None) -> Moments | None:
        """Return the sum of the moments of all ranks, some of which may have none."""
        shapes = ranks.gather(None if mine is None else (mine.read.shape, str(mine.read.device.type)))
        known = next((shape for shape in shapes if shape is not None), None)
        if len(shapes) == 1 or known is None:
            return mine
        (groups, inputs), device = known
        if mine is None:
            first = torch.zeros(groups, inputs, dtype=torch.float64, device=device)
            second = torch.zeros(groups, inputs, inputs, dtype=torch.float64, device=device)
            mine = cls(0.0, first, first, second, second)
        count = torch.tensor([mine.count], dtype=torch.float64, device=mine.read.device)
        count, *sums = ranks.sum_([count, mine.read, mine.wanted, mine.square, mine.cross])
        return cls(float(count), *sums)

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, key) + getattr(other, key) for key in vars(self)))

    def means(self) -> tuple[Tensor, Tensor]:
        """Return the mean inputs of the quantized and of the float network."""
        return self.read / self.count, self.wanted / self.count

    def covariances(self, centred: bool) -> tuple[Tensor, Tensor]:
        """Return ``square`` and ``cross`` per position, about the means if there is a bias to take those."""
        square, cross = self.square / self.count, self.cross / self.count
        if centred:
            read, wanted = self.means()
            square = square - read[:, :, None] * read[:, None]
            cross = cross - wanted[:, :, None] * read[:, None]
        return square, cross


@torch.no_grad()
def solve_layer(layer: nn.Module, teacher: nn.Module, quantizer: Quantizer, moments: Moments) -> None:
    """Give a layer the weights on its grid, and the bias, that come closest to the float layer's outputs, in place.

    Args:
        layer: A convolution or linear layer, its weight ``(outputs, inputs / groups, *kernel)``.
        teacher: The same in the float network.
        quantizer: The quantizer of the weight; its range stays.
        moments: Of what the layer reads. If nothing can be made of them, the layer stays as it is.
    """
    weight, bias, target = layer.weight, layer.bias, teacher.weight
    assert isinstance(weight, Tensor) and isinstance(target, Tensor)
    groups, inputs = moments.read.shape
    rows = target.double().reshape(groups, -1, inputs)
    square, cross = moments.covariances(centred=bias is not None)
    eye = torch.eye(inputs, dtype=square.dtype, device=square.device)
    for damping in _dampings(square, moments.square.diagonal(dim1=1, dim2=2).mean(1) / moments.count):
        damped = square + eye * damping[:, None, None]
        try:
            # The least-squares solution, and near it where the inputs do not say.
            best = rows + torch.linalg.solve(damped, rows @ (cross - square), left=False)
            solved = _rounded(best, damped, quantizer, weight)
            break
        except RuntimeError as error:  # torch.linalg.LinAlgError, which torch's types do not know
            if is_out_of_memory(error):
                raise
    else:
        return
    weight.copy_(solved.reshape(weight.shape))
    if isinstance(bias, Tensor):
        # What is multiplied is what the quantizer makes of the weight, to the last bit.
        rounded = quantizer.module(weight).double().reshape(rows.shape)
        read, wanted = moments.means()
        shift = (rows @ wanted[:, :, None] - rounded @ read[:, :, None]).flatten()
        bias.copy_(shift if teacher.bias is None else teacher.bias + shift)


def _dampings(square: Tensor, power: Tensor) -> Iterator[Tensor]:
    """Yield what to add to the diagonal, ``(groups,)``, from the least on: inputs that hardly change need more.

    Args:
        square: ``(groups, inputs, inputs)``; there nothing is left of it but what rounding made of their power.
        power: Mean power of the inputs, ``(groups,)``.
    """
    numbers = torch.finfo(torch.float32)
    least = DAMPING * square.diagonal(dim1=1, dim2=2).mean(1) + numbers.tiny
    yield least
    for exponent in range(7):
        yield torch.maximum(least, 10**exponent * numbers.eps * power)


def _rounded(rows: Tensor, square: Tensor, quantizer: Quantizer, weight: Tensor) -> Tensor:
    """Return ``rows`` on the grid: column after column, those with the largest inputs first, each error handed on."""
    order = square.diagonal(dim1=1, dim2=2).argsort(descending=True, dim=1)
    square = square.gather(1, order[:, :, None].expand_as(square)).gather(2, order[:, None].expand_as(square))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(square))
    upper = torch.linalg.cholesky(inverse, upper=True)
    place = order[:, None].expand_as(rows)
    left, found = rows.gather(2, place), torch.empty_like(rows)
    scale, zero_point = (
        value.double().reshape(-1).expand(len(weight)).reshape(*rows.shape[:2], 1) for value in quantizer.qparams()
    )
    low, high = quantizer.bounds
    for column in range(rows.shape[2]):
        here = left[:, :, column : column + 1]
        codes = ((here / scale).round() + zero_point).clamp(low, high) - zero_point
        found[:, :, column : column + 1] = codes * scale
        error = (here - codes * scale) / upper[:, column, column, None, None]
        left[:, :, column:] -= error * upper[:, column : column + 1, column:]
    return torch.empty_like(found).scatter_(2, place, found)
