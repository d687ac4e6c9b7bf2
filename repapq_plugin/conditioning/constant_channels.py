"""Input channels that never change: what they add to a layer's output goes into its bias.

A filter that died in training leaves a constant channel behind. A norm that followed it saw no variance and divided
by the square root of its epsilon, so a merged block multiplies that constant by weights hundreds of times as large as
all others and takes the product off again with its bias. In float this costs nothing. On integers those weights set
the scale of their rows, and the constant's rounding error comes out multiplied by them. The product is therefore
computed once, here, and the weights become zero (our choice; the MobileOne reference network has such
channels in its first stage, with biases up to 283. On the validation split, seed 0, ranges only, channels not
equalized, W6A6 scores 89.86 % with them and 92.82 % without, float 93.06 %).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from repapq_plugin.conditioning.channels import (
    B,
    L,
    Layer,
    is_plain,
    largest_weights,
    own_parameters,
    read_channels,
    tied_parameters,
)
from repapq_plugin.conditioning.judge import Judge
from repapq_plugin.core import ranks

logger = logging.getLogger(__name__)

OUTLIER = 4.0
"""Only columns of weights this many times as large as a layer's median one are folded: a feature that is merely rare
in the calibration data, and read with ordinary weights, stays."""

_TOLERANCE = 1e-5


@dataclass
class _Range:
    """Smallest and largest value of each channel that a layer read, ``[channels]``."""

    low: Tensor
    high: Tensor

    def widen(self, low: Tensor, high: Tensor) -> None:
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)


def _reads_channels_together(layer: nn.Module) -> TypeGuard[Layer]:
    return is_plain(layer) and (isinstance(layer, nn.Linear) or layer.groups == 1)


def _zero_padded(layer: Layer) -> bool:
    return isinstance(layer, nn.Conv2d) and (isinstance(layer.padding, str) or any(layer.padding))


@torch.no_grad()
def fold_constant_channels(
    model: nn.Module,
    run: Callable[[B], object],
    batches: Sequence[B],
    names: Collection[str],
    examples: Sequence[B] = (),
) -> dict[str, int]:
    """Move what constant channels contribute into biases, in place; on ``batches`` nothing else changes.

    A channel counts if it is the same everywhere, in all of ``batches``, and its weights stand out (`OUTLIER`). In
    front of a padded convolution only zero is: another constant ends where the padding begins. Layers that share their
    parameters, or have a forward of their own, stay as they are.

    Args:
        model: The merged float network, in evaluation mode.
        run: Makes a forward pass of it on a batch.
        batches: All calibration batches, of several ranks those of this one.
        names: Module paths of the layers that may be changed: those that are quantized.
        examples: Batches of which the first is judged by, the same on all ranks; default: ``batches``.

    Returns:
        Number of folded channels by layer name, in no case zero.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    tied = tied_parameters(model)
    layers: dict[Layer, str] = {}
    for name in names:
        layer = modules[name]
        if own_parameters(layer, tied) and _reads_channels_together(layer) and bool(_stands_out(layer).any()):
            layers[layer] = name
    if not layers:
        return {}
    example = (examples or batches)[0]
    judge = Judge(lambda: run(example), [(layer, []) for layer in layers])
    ranges = _over_ranks(_channel_ranges(layers, run, batches), list(layers))
    folded: dict[str, int] = {}
    while ranges:
        counts = {layer: _fold(layer, seen) for layer, seen in ranges.items()}
        folded = {layers[layer]: count for layer, count in counts.items() if count}
        guilty = judge.guilty([(layer, []) for layer, count in counts.items() if count], {}) if folded else []
        if not guilty:
            break
        judge.restore()
        folded = {}
        ranges = {layer: seen for layer, seen in ranges.items() if (layer, []) not in guilty}
    if folded:
        logger.info("Constant channels went into biases: %s", folded)
    return folded


def _stands_out(layer: Layer) -> Tensor:
    columns = largest_weights(layer)
    return columns > OUTLIER * columns.median()


def _channel_ranges(layers: Collection[L], run: Callable[[B], object], batches: Sequence[B]) -> dict[L, _Range]:
    ranges: dict[L, _Range] = {}

    def see(layer: L, values: Tensor) -> None:
        low, high = values.aminmax(dim=1)
        if layer in ranges:
            ranges[layer].widen(low, high)
        else:
            ranges[layer] = _Range(low, high)

    read_channels(layers, run, batches, see)
    return ranges


def _over_ranks(seen: dict[Layer, _Range], layers: Sequence[Layer]) -> dict[Layer, _Range]:
    """Return what channels hold over the batches of all ranks."""
    if ranks.world().size == 1:
        return seen
    ends: list[Tensor] = []
    for layer in layers:
        nothing = torch.full_like(layer.weight[0].flatten(1)[:, 0], -torch.inf)
        ends += (-seen[layer].low, seen[layer].high) if layer in seen else (nothing, nothing)
    largest = ranks.greatest([end.double() for end in ends])
    found = {}
    for layer, low, high in zip(layers, largest[::2], largest[1::2], strict=True):
        if bool(torch.isfinite(high).all()):
            found[layer] = _Range(-low.to(layer.weight), high.to(layer.weight))
    return found


def _fold(layer: Layer, seen: _Range) -> int:
    constant = seen.high - seen.low <= _TOLERANCE * seen.high.abs().max()
    if _zero_padded(layer):
        constant &= seen.high.abs() <= _TOLERANCE * seen.high.abs().max()
    chosen = constant & _stands_out(layer)
    if not bool(chosen.any()):
        return 0
    weight = layer.weight.double().flatten(2).sum(2) if isinstance(layer, nn.Conv2d) else layer.weight.double()
    middle = ((seen.low.double() + seen.high.double()) / 2)[chosen]
    added = weight[:, chosen] @ middle
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros_like(layer.weight[:, 0].flatten(1)[:, 0]), requires_grad=False)
    layer.bias.copy_((layer.bias.double() + added).to(layer.bias.dtype))
    layer.weight[:, chosen] = 0
    return int(chosen.sum())
