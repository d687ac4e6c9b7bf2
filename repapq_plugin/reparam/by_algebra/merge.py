"""Merge by algebra: whatever is affine and shift-invariant is a convolution, whatever its class.

The own forward of every module is looked at for sums of branches. Between a tensor and the largest
part of the forward that is linear in it then stands one convolution, and the rest of the forward
stays as it is. A block whose forward cannot be traced is asked for its impulse response as a whole.
Nothing is replaced before it was seen, in float64, to give what it gave (our choice).
"""

from __future__ import annotations

import copy
import fnmatch
import logging
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from repapq_plugin.core.running import inference
from repapq_plugin.core.tensors import tensors_of
from repapq_plugin.errors import MergeError
from repapq_plugin.reparam.branches import qualified_name
from repapq_plugin.reparam.by_algebra.forward_graph import ForwardGraph, takes_one_input
from repapq_plugin.reparam.by_algebra.impulse import NotAffineError
from repapq_plugin.reparam.by_algebra.regions import (
    MAX_GROWTH,
    Algebra,
    empty_like,
    holds_activation,
    is_builtin,
    whole_map,
)
from repapq_plugin.reparam.by_algebra.unknown import find_unknown_multibranch
from repapq_plugin.reparam.linear_map import to_conv
from repapq_plugin.reparam.merged import MergedBlock, MergeRecord
from repapq_plugin.reparam.norms import is_norm

logger = logging.getLogger(__name__)

# What two float64 computations of the same block may differ by, relative to its largest output.
_EXACT = 1e-9


class _Tap(fx.Interpreter):
    """Runs a graph and keeps copies of some values."""

    def __init__(self, forward: ForwardGraph, nodes: Collection[fx.Node]) -> None:
        super().__init__(forward.root, graph=forward.graph)
        self.nodes, self.kept = nodes, dict[fx.Node, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.nodes:
            self.kept[n] = value.clone()
        return value


def _relative(actual: Any, wanted: Any) -> float:
    """Largest difference of two results, relative to the largest value of each tensor."""
    pairs = list(zip(tensors_of(actual), tensors_of(wanted), strict=True))
    worst = 0.0 if pairs else math.inf
    for a, b in pairs:
        if a.shape != b.shape or not bool(b.isfinite().all()):
            return math.inf
        if b.numel():
            peak = float(b.double().abs().max())
            error = float((a.double() - b.double()).abs().max())
            worst = max(worst, error / peak if peak > 0 else error)
    return worst if worst == worst else math.inf


def _images(channels: int, reach: int, like: Tensor) -> Iterator[Tensor]:
    """Random images of several sizes and scales; small ones first, as wide blocks take long."""
    generator = torch.Generator().manual_seed(0)
    for batch, height, width, scale in (
        (2, reach + 3, reach + 2, 1.0),
        (1, reach + 6, reach + 4, 100.0),
        (3, reach + 4, reach + 7, 0.01),
        (2, 32, 64, 1.0),
        (1, 64, 32, 100.0),
    ):
        image = torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)
        yield (scale * image).to(like)


def _reach(convs: Collection[nn.Conv2d]) -> int:
    sides = [zip(conv.dilation, conv.kernel_size, conv.stride, strict=True) for conv in convs]
    return max(dilation * (size - 1) + 2 * stride + 1 for side in sides for dilation, size, stride in side)


def _error(block: nn.Module, merged: nn.Module, channels: int, reach: int) -> float:
    """Compare a block with its merged form on the first three images that the block can take."""
    errors: list[float] = []
    failure: Exception | None = None
    for image in _images(channels, reach, empty_like(block)):
        try:
            wanted = block(image.clone())
        except Exception as error:
            failure = error
            continue
        errors.append(_relative(merged(image.clone()), wanted))
        if len(errors) == 3:
            break
    if not errors:
        raise MergeError(
            f"the block cannot be run alone on one input, so merging it cannot be checked "
            f"({type(failure).__name__}: {failure})."
        )
    return max(errors)


def _verified(block: nn.Module, merged: nn.Module, algebra: Algebra) -> float:
    """Return the relative error of merging; raise `MergeError` if it does not come from rounding."""
    lone = copy.deepcopy(block).double()
    forward = Algebra(algebra.with_identity).forward_of(lone)
    channels = forward.channels(forward.graph.input)
    if channels is None:
        raise MergeError("no layer tells the number of its input channels, so merging it cannot be checked.")
    regions, _ = forward.regions()
    if not regions:
        raise MergeError("a float64 copy of the block is not found to be linear.")
    reach = _reach([region.conv for region in regions])
    # The regions themselves, as what follows them may hide a difference.
    nodes = {node for region in regions for node in (region.source, region.node)}
    for image in _images(channels, reach, empty_like(lone)):
        tap = _Tap(forward.graph, nodes)
        try:
            tap.run(image)
        except Exception as failure:
            logger.debug("%s cannot be run on an image of %s: %s", type(block).__name__, tuple(image.shape), failure)
            continue
        for region in regions:
            _check_exact(_relative(region.conv(tap.kept[region.source]), tap.kept[region.node]))
        break
    _check_exact(_error(lone, forward.rewritten(regions), channels, reach))
    error = _error(block, merged, channels, reach)
    if not math.isfinite(error):
        raise MergeError(f"the merged block is not finite in {empty_like(block).dtype}.")
    return error


def _check_exact(error: float) -> None:
    if not error <= _EXACT:
        raise MergeError(f"merged and branched block differ by {error:.1e} of the largest output.")


@dataclass(frozen=True)
class _Outcome:
    merged: nn.Module | None
    branches: int = 0
    kernel_size: tuple[int, int] | None = None
    error: float | None = None
    reason: str = ""


def _by_parts(block: nn.Module, algebra: Algebra, verify: bool) -> _Outcome | None:
    """Merge the sums in a block's own forward; None if it shows none."""
    forward = algebra.forward_of(block)
    regions, reason = forward.regions()
    if not regions:
        return None if reason is None else _Outcome(None, reason=reason)
    size = regions[0].conv.kernel_size
    merged = forward.rewritten(regions)
    error = _verified(block, merged, algebra) if verify else None
    return _Outcome(merged, max(region.branches for region in regions), (size[0], size[1]), error)


def _as_a_whole(block: nn.Module, algebra: Algebra, verify: bool) -> _Outcome | None:
    """Merge a block whose forward is not understood, but seen to add branches; None if it is not."""
    channels = algebra.channels_of(block)
    layers = [layer for layer in block.modules() if isinstance(layer, nn.Conv2d) or is_norm(layer)]
    if channels is None or len(layers) < 2 or holds_activation(block):
        return None
    lone = copy.deepcopy(block).double()
    image = next(_images(channels, 5, empty_like(lone)))
    try:
        if "" not in find_unknown_multibranch(lone, lambda module: module(image)):
            return None
    except Exception as failure:
        logger.debug("%s cannot be run alone: %s", type(block).__name__, failure)
        return None
    linear = whole_map(block, channels, type(block).__name__)
    parameters = [p for p in block.parameters() if p.is_floating_point()]
    conv = to_conv(linear, parameters[0].dtype).requires_grad_(any(p.requires_grad for p in parameters))
    weights = sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Conv2d))
    if conv.weight.numel() > MAX_GROWTH * weights:
        raise MergeError(f"one convolution would hold {conv.weight.numel()} weights in place of {weights}.")
    error = _error(block, conv, channels, _reach([conv])) if verify else None
    return _Outcome(MergedBlock(conv), 0, (conv.kernel_size[0], conv.kernel_size[1]), error)


def _outcome(block: nn.Module, algebra: Algebra, verify: bool) -> _Outcome | None:
    """Merge what can be merged in a block; None if there is nothing to say about it."""
    outcome: _Outcome | None = None
    try:
        outcome = _by_parts(block, algebra, verify)
        if outcome is None or outcome.merged is not None:
            return outcome
    except NotAffineError as failure:
        logger.debug("%s: %s", type(block).__name__, failure)
    except MergeError as failure:
        return _Outcome(None, reason=str(failure))
    reason = outcome.reason if outcome is not None else ""
    try:
        whole = _as_a_whole(block, algebra, verify)
    except MergeError as failure:
        whole, reason = None, reason or str(failure)
    return whole or (_Outcome(None, reason=reason) if reason else None)


def _may_be_block(module: nn.Module) -> bool:
    holds_weights = any(True for _ in module.parameters())
    return holds_weights and not is_builtin(module) and type(module) is not MergedBlock and takes_one_input(module)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
    return new if model is old else model


def merge_by_algebra(
    model: nn.Module,
    *,
    known: Collection[nn.Module] = (),
    with_identity: Collection[str] = (),
    verify: bool = True,
    skip: Collection[str] = (),
) -> tuple[nn.Module, list[MergeRecord]]:
    """Merge, in place, the branches of blocks whose class nobody taught.

    Inner modules come first, so that an outer block finds its branches merged already and may become
    one convolution itself. A block of nothing else becomes a `MergedBlock`; of any other the forward
    stays what it was, with a `MergedBlock` in place of the branches.

    Args:
        model: Any module.
        known: Modules to leave alone, because their class was taught.
        with_identity: Full names of classes in which a single convolution and the identity are merged.
        verify: Compare each block with its merged form on random images, in float64.
        skip: Names, or glob patterns of names, of blocks to leave alone.

    Returns:
        The model (a new module if ``model`` itself was a block), and a record of each block that was
        merged or that adds linear branches but is no convolution; in the order of
        ``model.named_modules()``.
    """
    order = list(model.named_modules())
    modes = {module: module.training for _, module in order}
    algebra = Algebra(with_identity)
    records: dict[str, tuple[MergeRecord, nn.Module | None]] = {}
    with inference(model):
        for name, block in reversed(order):
            if block in known or not _may_be_block(block) or any(fnmatch.fnmatchcase(name, key) for key in skip):
                continue
            outcome = _outcome(block, algebra, verify)
            algebra.forget()
            if outcome is None:
                continue
            record = _record(name or "model", block, outcome)
            if outcome.merged is not None:
                for module in outcome.merged.modules():
                    module.training = modes.setdefault(module, modes[block])
                model = _replace(model, block, outcome.merged)
                swallowed = {key for key, (_, new) in records.items() if key.startswith(f"{name}.") and new is not None}
                inside = set(outcome.merged.modules())
                for key in swallowed:
                    if records[key][1] not in inside:
                        del records[key]
            records[name] = (replace(record, name=name), outcome.merged)
    for module in model.modules():
        module.training = modes.get(module, module.training)
    return model, [records[name][0] for name, _ in order if name in records]


def _record(where: str, block: nn.Module, outcome: _Outcome) -> MergeRecord:
    kind = qualified_name(type(block))
    if outcome.merged is None:
        logger.warning("%s (%s) adds linear branches and stays as it is: %s", where, kind, outcome.reason)
    else:
        rows, cols = outcome.kernel_size or (0, 0)
        logger.info("%s (%s) is affine and shift-invariant: merged into a %dx%d convolution.", where, kind, rows, cols)
    return MergeRecord(
        where, kind, outcome.branches, outcome.kernel_size, outcome.error, outcome.merged is not None,
        outcome.reason, "algebra",
    )  # fmt: skip
