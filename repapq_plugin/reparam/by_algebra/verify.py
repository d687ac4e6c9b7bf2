"""A merged block gives what the block gave: seen in float64, with its regions on their own and as a whole."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, fx, nn

from repapq_plugin.core.compare import EXACT, precise, relative_error
from repapq_plugin.core.copies import HALVES, plain_copy
from repapq_plugin.core.modules import without_hooks
from repapq_plugin.core.running import is_out_of_memory
from repapq_plugin.core.tensors import tensors_of
from repapq_plugin.errors import MergeError
from repapq_plugin.reparam.by_algebra.algebra import Algebra
from repapq_plugin.reparam.by_algebra.forward_graph import ForwardGraph
from repapq_plugin.reparam.by_algebra.impulse import empty_like
from repapq_plugin.reparam.by_algebra.regions import RegionSearch
from repapq_plugin.reparam.by_algebra.rewriting import rewritten

logger = logging.getLogger(__name__)


class _Tap(fx.Interpreter):
    """Runs a graph and keeps copies of some values."""

    def __init__(self, forward: ForwardGraph, nodes: Collection[fx.Node]) -> None:
        super().__init__(forward.root, graph=forward.graph)
        self.nodes, self.kept = nodes, dict[fx.Node, Tensor]()

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n in self.nodes:
            self.kept[n] = value.clone()
        return value


def _error(actual: object, wanted: object) -> float:
    """Largest difference of two results, relative to the largest value of each tensor; infinite where there is none."""
    tensors = tensors_of(wanted)
    return relative_error(tensors_of(actual), tensors) if tensors else math.inf


def images(channels: int, smallest: int, like: Tensor) -> Iterator[Tensor]:
    """Random images of several sizes and scales; small ones first, as wide blocks take long."""
    generator = torch.Generator().manual_seed(0)
    for batch, height, width, scale in (
        (2, smallest + 3, smallest + 2, 1.0),
        (1, smallest + 6, smallest + 4, 100.0),
        (3, smallest + 4, smallest + 7, 0.01),
        (2, 32, 64, 1.0),
        (1, 64, 32, 100.0),
    ):
        image = torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)
        yield (scale * image).to(like)


def reach(convs: Collection[nn.Conv2d]) -> int:
    """Return a size of images on which every tap of ``convs`` is used, and more than one output given."""
    sides = [zip(conv.dilation, conv.kernel_size, conv.stride, strict=True) for conv in convs]
    return max(dilation * (size - 1) + 2 * stride + 1 for side in sides for dilation, size, stride in side)


def error_on_images(block: nn.Module, merged: nn.Module, channels: int, size: int) -> float:
    """Compare a block with its merged form on the first three images that the block can take.

    Args:
        block: In evaluation mode.
        merged: What is to replace it.
        channels: Channels of its input.
        size: Smallest size of an image on which every tap is used.

    Returns:
        The largest difference relative to the block's largest output.

    Raises:
        MergeError: The block cannot be run on any of the images.
    """
    errors: list[float] = []
    refusal: Exception | None = None
    for image in images(channels, size, empty_like(block)):
        try:
            wanted = block(image.clone())
        except Exception as failure:
            if is_out_of_memory(failure):
                raise
            refusal = failure
            continue
        errors.append(_error(merged(image.clone()), wanted))
        if len(errors) == 3:
            break
    if not errors:
        raise MergeError(
            f"the block cannot be run alone on one input, so merging it cannot be checked "
            f"({type(refusal).__name__}: {refusal})."
        )
    return max(errors)


@precise()
def verified(block: nn.Module, merged: nn.Module, *, takes_identity: bool) -> float:
    """Return the relative error of merging the sums in a block's own forward.

    Args:
        block: In evaluation mode; left as it is.
        merged: What is to replace it.
        takes_identity: As for `RegionSearch`.

    Raises:
        MergeError: The error does not come from rounding, or cannot be measured.
    """
    block = without_hooks(block)  # it keeps them, so they are no part of what is merged
    lone = plain_copy(block).double()
    forward = Algebra().forward_of(lone)
    channels = forward.channels(forward.graph.input)
    if channels is None:
        raise MergeError("no layer tells the number of its input channels, so merging it cannot be checked.")
    regions, _ = RegionSearch(forward, takes_identity=takes_identity).run()
    if not regions:
        raise MergeError("a float64 copy of the block is not found to be linear.")
    size = reach([region.conv for region in regions])
    # The regions themselves, as what follows them may hide a difference.
    nodes = {node for region in regions for node in (region.source, region.node)}
    for image in images(channels, size, empty_like(lone)):
        tap = _Tap(forward.graph, nodes)
        try:
            tap.run(image)
        except Exception as failure:
            if is_out_of_memory(failure):
                raise
            logger.debug("%s cannot be run on an image of %s: %s", type(block).__name__, tuple(image.shape), failure)
            continue
        for region in regions:
            _check_exact(_error(region.conv(tap.kept[region.source]), tap.kept[region.node]))
        break
    exact = error_on_images(lone, rewritten(forward.graph, regions, type(lone).__name__), channels, size)
    _check_exact(exact)
    try:
        error = error_on_images(block, merged, channels, size)
    except MergeError:
        if empty_like(block).dtype not in HALVES:
            raise
        return exact  # a processor may have no half precision for these layers
    if not math.isfinite(error):
        raise MergeError(f"the merged block is not finite in {empty_like(block).dtype}.")
    return error


def _check_exact(error: float) -> None:
    if not error <= EXACT:
        raise MergeError(f"merged and branched block differ by {error:.1e} of the largest output.")
