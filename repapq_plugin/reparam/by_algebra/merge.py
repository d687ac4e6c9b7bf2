"""Merge by algebra: whatever is affine and shift-invariant is a convolution, whatever its class.

The own forward of every module is looked at for sums of branches. Between a tensor and the largest
part of the forward that is linear in it then stands one convolution, and the rest of the forward
stays as it is. A block whose forward cannot be traced is asked for its impulse response as a whole.
Nothing is replaced before it was seen, in float64, to give what it gave (our choice).
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import fx, nn

from repapq_plugin.core.copies import plain_copy
from repapq_plugin.core.modules import own_class, replace_modules, without_hooks
from repapq_plugin.core.running import inference, is_out_of_memory
from repapq_plugin.errors import MergeError
from repapq_plugin.reparam.branches import qualified_name
from repapq_plugin.reparam.by_algebra.algebra import Algebra, holds_activation, is_builtin
from repapq_plugin.reparam.by_algebra.forward_graph import takes_one_input
from repapq_plugin.reparam.by_algebra.impulse import NotAffineError, empty_like, whole_map
from repapq_plugin.reparam.by_algebra.regions import MAX_GROWTH, RegionSearch
from repapq_plugin.reparam.by_algebra.rewriting import rewritten
from repapq_plugin.reparam.by_algebra.unknown import find_unknown_multibranch
from repapq_plugin.reparam.by_algebra.verify import error_on_images, images, reach, verified
from repapq_plugin.reparam.linear_map import to_conv
from repapq_plugin.reparam.merged import MergedBlock, MergeRecord
from repapq_plugin.reparam.norms import is_norm
from repapq_plugin.reparam.take_over import take_over

__all__ = ["MAX_GROWTH", "merge_by_algebra"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Outcome:
    """What became of one block: its merged form, or why there is none."""

    merged: MergedBlock | fx.GraphModule | None
    branches: int = 0
    kernel_size: tuple[int, int] | None = None
    error: float | None = None
    reason: str = ""


class _BlockMerger:
    """Merges one block after the other of one network.

    Args:
        with_identity: Full names of classes in which a single convolution and the identity are two branches.
        verify: Whether to compare each block with its merged form.
    """

    def __init__(self, with_identity: Collection[str], verify: bool) -> None:
        self.with_identity, self.verify = frozenset(with_identity), verify
        self.algebra = Algebra()

    def merge(self, block: nn.Module) -> _Outcome | None:
        """Merge what can be merged in a block; None if there is nothing to say about it."""
        try:
            return self._merge(block)
        finally:
            self.algebra.forget()

    def _merge(self, block: nn.Module) -> _Outcome | None:
        outcome: _Outcome | None = None
        try:
            outcome = self._by_parts(block)
            if outcome is None or outcome.merged is not None:
                return outcome
        except NotAffineError as failure:
            logger.debug("%s: %s", type(block).__name__, failure)
        except MergeError as failure:
            return _Outcome(None, reason=str(failure))
        reason = outcome.reason if outcome is not None else ""
        try:
            whole = self._as_a_whole(block)
        except MergeError as failure:
            whole, reason = None, reason or str(failure)
        return whole or (_Outcome(None, reason=reason) if reason else None)

    def _by_parts(self, block: nn.Module) -> _Outcome | None:
        """Merge the sums in a block's own forward; None if it shows none."""
        forward = self.algebra.forward_of(block)
        takes_identity = qualified_name(own_class(block)) in self.with_identity
        regions, reason = RegionSearch(forward, takes_identity=takes_identity).run()
        if not regions:
            return None if reason is None else _Outcome(None, reason=reason)
        merged = rewritten(forward.graph, regions, own_class(block).__name__)
        error = verified(block, merged, takes_identity=takes_identity) if self.verify else None
        return _Outcome(merged, max(region.branches for region in regions), _size(regions[0].conv), error)

    def _as_a_whole(self, block: nn.Module) -> _Outcome | None:
        """Merge a block whose forward is not understood, but seen to add branches; None if it is not."""
        channels = self.algebra.channels_of(block)
        layers = [layer for layer in block.modules() if isinstance(layer, nn.Conv2d) or is_norm(layer)]
        if channels is None or len(layers) < 2 or holds_activation(block):
            return None
        if not _adds_branches(block, channels):
            return None
        # The block keeps its own hooks, so they are no part of what is merged.
        block = without_hooks(block)
        linear = whole_map(block, channels, own_class(block).__name__)
        parameters = [p for p in block.parameters() if p.is_floating_point()]
        conv = to_conv(linear, parameters[0].dtype).requires_grad_(any(p.requires_grad for p in parameters))
        weights = sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Conv2d))
        if conv.weight.numel() > MAX_GROWTH * weights:
            raise MergeError(f"one convolution would hold {conv.weight.numel()} weights in place of {weights}.")
        error = error_on_images(block, conv, channels, reach([conv])) if self.verify else None
        return _Outcome(MergedBlock(conv), 0, _size(conv), error)


def _size(conv: nn.Conv2d) -> tuple[int, int]:
    return conv.kernel_size[0], conv.kernel_size[1]


def _adds_branches(block: nn.Module, channels: int) -> bool:
    """Tell whether a block is seen to add branches when it is run alone."""
    lone = plain_copy(without_hooks(block)).double()
    image = next(images(channels, 5, empty_like(lone)))
    try:
        return "" in find_unknown_multibranch(lone, lambda module: module(image))
    except Exception as failure:
        if is_out_of_memory(failure):
            raise
        logger.debug("%s cannot be run alone: %s", type(block).__name__, failure)
        return False


def _may_be_block(module: nn.Module) -> bool:
    holds_weights = any(True for _ in module.parameters())
    return holds_weights and not is_builtin(module) and not isinstance(module, MergedBlock) and takes_one_input(module)


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
    one convolution itself. Each block stays the user's own module: of nothing else, it becomes a
    `MergedBlock`; of any other the forward stays what it was, with a `MergedBlock` in place of the branches.

    Args:
        model: A module.
        known: Modules to leave alone, because their class was taught.
        with_identity: Full names of classes in which a single convolution and the identity are merged.
        verify: Compare each block with its merged form on random images, in float64.
        skip: Names, or glob patterns of names, of blocks to leave alone.

    Returns:
        The model (another module only if it was itself a block that cannot go on, see `take_over`), and a
        record of each block that was merged or that adds linear branches but is no convolution; in the
        order of ``model.named_modules()``.
    """
    order = list(model.named_modules())
    modes = {module: module.training for _, module in order}
    merger = _BlockMerger(with_identity, verify)
    new: nn.Module | None
    records: dict[str, tuple[MergeRecord, nn.Module | None]] = {}
    with inference(model):
        for name, block in reversed(order):
            if block in known or not _may_be_block(block) or any(fnmatch.fnmatchcase(name, key) for key in skip):
                continue
            outcome = merger.merge(block)
            if outcome is None:
                continue
            record, new = _record(name or "model", block, outcome), None
            if outcome.merged is not None:
                new = take_over(block, outcome.merged)
                model = replace_modules(model, {block: new})
                inside = set(new.modules())
                for module in inside:
                    modes.setdefault(module, modes[block])
                    module.training = False  # a block around it may be looked at next
                swallowed = {key for key, (_, old) in records.items() if key.startswith(f"{name}.") and old is not None}
                for key in swallowed:
                    if records[key][1] not in inside:
                        del records[key]
            records[name] = (replace(record, name=name), new)
    for module in model.modules():
        module.training = modes.get(module, module.training)
    return model, [records[name][0] for name, _ in order if name in records]


def _record(where: str, block: nn.Module, outcome: _Outcome) -> MergeRecord:
    kind = qualified_name(own_class(block))
    if outcome.merged is None:
        logger.warning("%s (%s) adds linear branches and stays as it is: %s", where, kind, outcome.reason)
    else:
        rows, cols = outcome.kernel_size or (0, 0)
        logger.info("%s (%s) is affine and shift-invariant: merged into a %dx%d convolution.", where, kind, rows, cols)
    return MergeRecord(
        where, kind, outcome.branches, outcome.kernel_size, outcome.error, outcome.merged is not None,
        outcome.reason, "algebra",
    )  # fmt: skip
