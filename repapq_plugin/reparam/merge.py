"""Merge the branches of reparameterized blocks into one convolution each, and check it.

Fused in float64 with each norm's own eps, returned in the block's own dtype (our choice; the
families themselves fuse in float32).
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from repapq_plugin.core.compare import EXACT, precise, relative_error
from repapq_plugin.core.copies import HALVES, plain_copy
from repapq_plugin.core.modules import own_class, replace_modules, without_hooks
from repapq_plugin.core.running import inference, is_out_of_memory
from repapq_plugin.core.tensors import tensors_of
from repapq_plugin.errors import MergeError
from repapq_plugin.reparam.branches import Branch, BranchSpec, branches_of, is_registered, qualified_name
from repapq_plugin.reparam.by_algebra.merge import merge_by_algebra
from repapq_plugin.reparam.families import TAKE_IDENTITY
from repapq_plugin.reparam.layer_maps import branch_map, flattened, input_channels
from repapq_plugin.reparam.linear_map import LinearMap, in_parallel, scaled, to_conv
from repapq_plugin.reparam.merged import MergedBlock, MergeRecord
from repapq_plugin.reparam.take_over import take_over

__all__ = ["MergeRecord", "MergedBlock", "fuse_branches", "merge_branches"]

logger = logging.getLogger(__name__)


def _parameters(spec: BranchSpec) -> list[Tensor]:
    """Floating-point tensors of all branches, the convolutions' weights first."""
    modules = [module for branch in spec.branches for layer in branch.layers for module in layer.modules()]
    modules.sort(key=lambda module: not isinstance(module, nn.Conv2d))
    tensors: list[Tensor] = [p for module in modules for p in module.parameters(recurse=False)]
    tensors += [tensor for module in modules for tensor in module.buffers(recurse=False)]
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def _branch(branch: Branch, channels: int, like: Tensor, where: str) -> LinearMap:
    result = branch_map(flattened(branch.layers), channels, like, where)
    scale = torch.as_tensor(branch.scale, dtype=torch.float64, device=like.device).detach().flatten()
    if scale.numel() not in (1, result.out_channels):
        raise MergeError(f"{where}: Branch.scale has {scale.numel()} elements; give one, or {result.out_channels}.")
    return scaled(result, scale)


@torch.no_grad()
def fuse_branches(spec: BranchSpec, *, where: str = "block") -> nn.Conv2d:
    """Merge the branches of one block into one convolution with bias.

    Taps are merged on the union of their positions (3x3 + 1x1 + identity, dilated + 1x1, 1x3 + 3x1,
    average pooling), groups to their largest common divisor.

    Args:
        spec: The block's branches; left as they are.
        where: Path of the block, for the error text.

    Returns:
        A convolution on the branches' device and in their dtype, trainable if any of them was.

    Raises:
        MergeError: A branch is not a convolution at inference, the branches' outputs cannot be added,
            or the result is not finite.
    """
    parameters = _parameters(spec)
    widths = [input_channels(flattened(branch.layers)) for branch in spec.branches]
    channels = next((width for width in widths if width is not None), None)
    if channels is None or not parameters:
        raise MergeError(f"{where}: no branch holds a convolution or a norm, so there is nothing to merge.")
    dtype, like = parameters[0].dtype, parameters[0].new_zeros((), dtype=torch.float64)
    maps = [_branch(branch, channels, like, where) for branch in spec.branches]
    conv = to_conv(in_parallel(maps, where), dtype)
    conv.requires_grad_(any(parameter.requires_grad for parameter in parameters))
    if not all(bool(parameter.isfinite().all()) for parameter in conv.parameters()):
        raise MergeError(f"{where}: the merged weights are not finite in {dtype}; check the checkpoint.")
    return conv


def _probe(conv: nn.Conv2d) -> Tensor:
    """Random input that is small, and yet larger than the kernel; the same one every time."""
    reach = zip(conv.kernel_size, conv.dilation, conv.stride, strict=True)
    size = [dilation * (kernel - 1) + 2 * stride + 1 for kernel, dilation, stride in reach]
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(2, conv.in_channels, *size, generator=generator, dtype=torch.float64)
    return probe.to(conv.weight)


def _sum_of_branches(spec: BranchSpec, x: Tensor) -> Tensor:
    total = x.new_zeros(())
    for branch in spec.branches:
        y = x
        for layer in branch.layers:
            y = layer(y)
        scale = torch.as_tensor(branch.scale, dtype=x.dtype, device=x.device).flatten()
        total = total + scale.reshape(1, -1, 1, 1) * y
    return total


def _difference(block: nn.Module, spec: BranchSpec, conv: nn.Conv2d) -> float:
    """Compare a block with its merged form on random input, relative to the largest output.

    The sums of the branches are compared besides, as an activation may hide everything.
    """
    x = _probe(conv)
    merged = MergedBlock(conv, spec.after)
    # The block keeps its own hooks, so they are no part of what is merged.
    alone = without_hooks(block)
    with inference(block), inference(alone):
        error = relative_error([conv(x)], [_sum_of_branches(spec, x.clone())])
        wanted: object = alone(x.clone())
        if not isinstance(wanted, Tensor):
            raise MergeError(
                f"the block gives {type(wanted).__name__} and no tensor, but what a convolution gives is one."
            )
        return max(error, relative_error(tensors_of(merged(x.clone())), [wanted]))


def _exact_difference(block: nn.Module, where: str) -> float:
    """`_difference` of a float64 copy of the block, where nothing but a wrong merge can differ."""
    block = plain_copy(without_hooks(block)).double()
    spec = branches_of(block)
    if spec is None:
        raise MergeError(f"{where}: a copy of the block no longer tells its branches.")
    return _difference(block, spec, fuse_branches(spec, where=where))


@precise()
def _verified(block: nn.Module, spec: BranchSpec, conv: nn.Conv2d, where: str) -> float:
    """Return the relative error of merging; raise `MergeError` if it does not come from rounding."""
    half = conv.weight.dtype in HALVES
    try:
        error = _measured(block, spec, conv, half)
        if error is not None and not half and error <= min(1000 * torch.finfo(conv.weight.dtype).eps, 0.05):
            return error
        # Branches that nearly cancel, or differ much in magnitude, round badly by themselves; half precision hides
        # what float64 shows.
        exact = _exact_difference(block, where)
    except MergeError:
        raise
    except Exception as failure:
        if is_out_of_memory(failure):
            raise
        raise MergeError(
            f"{where}: the block cannot be run alone on one input, so merging it cannot be checked "
            f"({type(failure).__name__}: {failure})."
        ) from failure
    if not exact <= EXACT:
        raise MergeError(
            f"{where}: merged and branched block differ by {exact:.1e} of the largest output; the "
            f"function registered for {qualified_name(own_class(block))} does not describe its forward."
        )
    return exact if error is None else error


def _measured(block: nn.Module, spec: BranchSpec, conv: nn.Conv2d, half: bool) -> float | None:
    """`_difference`, or None where half precision cannot be run: a processor may not have it for these layers."""
    try:
        return _difference(block, spec, conv)
    except RuntimeError as failure:
        if half and not is_out_of_memory(failure):
            return None
        raise


def _merge(block: nn.Module, spec: BranchSpec, name: str, verify: bool) -> tuple[MergedBlock | None, MergeRecord]:
    where = name or "model"
    block_class, count = qualified_name(own_class(block)), len(spec.branches)
    try:
        conv = fuse_branches(spec, where=where)
        error = _verified(block, spec, conv, where) if verify else None
    except MergeError as failure:
        logger.warning("%s stays as it is: %s", where, failure)
        return None, MergeRecord(name, block_class, count, None, None, False, str(failure))
    merged = MergedBlock(conv, spec.after)
    for made in (merged, merged.conv, merged.after):
        made.training = block.training
    size = (conv.kernel_size[0], conv.kernel_size[1])
    return merged, MergeRecord(name, block_class, count, size, error, True)


def merge_branches(
    model: nn.Module, *, inplace: bool = False, verify: bool = True, skip: Collection[str] = ()
) -> tuple[nn.Module, list[MergeRecord]]:
    """Replace the branches of every multi-branch block by one convolution.

    Blocks stay the user's own modules: of their class, with their attributes, hooks and names (see `take_over`). One
    whose class was taught plays the role of a `MergedBlock`; of what is left, `merge_by_algebra` merges
    whatever adds linear branches and equals a convolution. A block that cannot be merged, or whose
    merged form gives another result, stays as it is, with a reason in its record and a warning. A
    block that appears under several names is merged once and stays shared.

    Args:
        model: A module; may itself be a block.
        inplace: Change ``model`` instead of a copy of it.
        verify: Run each block on random input, branched and merged, and compare.
        skip: Names, or glob patterns of names, of blocks to leave alone.

    Returns:
        The model (another module only if it was itself a block that cannot go on, see `take_over`) and one
        record per block, in the order of ``model.named_modules()``. Blocks of unknown classes have one only
        if they add linear branches.
    """
    model = model if inplace else plain_copy(model)
    merged_blocks: dict[nn.Module, MergedBlock] = {}
    records: list[MergeRecord] = []
    inside: set[nn.Module] = set()
    for name, block in model.named_modules():
        if block in inside or not is_registered(block):
            continue
        try:
            skipped = any(fnmatch.fnmatchcase(name, pattern) for pattern in skip)
            spec = None if skipped else branches_of(block)
        except MergeError as failure:
            logger.warning("%s stays as it is: %s", name or "model", failure)
            records.append(MergeRecord(name, qualified_name(own_class(block)), 0, None, None, False, str(failure)))
            continue
        if skipped or spec is not None:
            inside.update(block.modules())
        if spec is None:
            continue
        merged, record = _merge(block, spec, name, verify)
        records.append(record)
        if merged is not None:
            merged_blocks[block] = merged
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    new = {block: take_over(block, merged) for block, merged in merged_blocks.items()}
    model = replace_modules(model, {block: other for block, other in new.items() if other is not block})
    taught = {inner for block in model.modules() if is_registered(block) for inner in block.modules()}
    model, others = merge_by_algebra(model, known=taught, with_identity=TAKE_IDENTITY, verify=verify, skip=skip)
    return model, sorted([*records, *others], key=lambda record: _place(record.name, order))


def _place(name: str, order: Mapping[str, int]) -> int:
    """Return the place of a module, or of the block that it came to stand in."""
    while name not in order:
        name = name.rpartition(".")[0]
    return order[name]
