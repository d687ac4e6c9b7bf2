"""A float network as it is deployed: computed weights made plain, branches merged, norms folded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from repapq_plugin.core.copies import is_half, own_copy, takes_halves
from repapq_plugin.core.notes import listed
from repapq_plugin.quantizers.own_forward import bake_weights
from repapq_plugin.reparam.by_algebra.unknown import find_unknown_multibranch
from repapq_plugin.reparam.fold import fold_norms
from repapq_plugin.reparam.merge import MergeRecord, merge_branches
from repapq_plugin.reparam.parametrized import bake_parametrizations

logger = logging.getLogger(__name__)


class Merged(NamedTuple):
    """A float network as it is deployed.

    Args:
        network: In evaluation mode, branches merged and norms folded.
        folded: Pairs (layer, norm) of module paths whose norm went into the layer.
        records: One entry per multi-branch block.
        notes: Norms that stay; blocks that look as if they had branches, but are unknown.
        baked: Layers whose weight became what their own forward had made of it.
    """

    network: nn.Module
    folded: tuple[tuple[str, str], ...] = ()
    records: tuple[MergeRecord, ...] = ()
    notes: tuple[str, ...] = ()
    baked: tuple[str, ...] = ()


@torch.no_grad()
def merge_for_inference(model: nn.Module, run: Callable[[nn.Module], object]) -> Merged:
    """Return a copy of ``model`` in evaluation mode with branches merged and norms folded.

    Args:
        model: Any float network; not changed.
        run: Makes one forward pass of a network like ``model``.
    """
    merged = own_copy(model)
    notes = []
    training = [name for name, module in merged.named_modules() if module.training]
    if training:
        notes.append(
            f"Told eval(), {len(training)} modules stay in training mode; they are quantized as at inference: "
            f"{', '.join(training[:5])}{' ...' if len(training) > 5 else ''}."
        )
        logger.warning(notes[-1])
    for module in merged.modules():
        module.training = False
    if is_half(model):
        takes_halves(merged)
        notes.append("The network is in half precision; what was quantized computes in float32, and takes either.")
    bake_parametrizations(merged)
    baked = bake_weights(merged, lambda: run(merged))
    merged, records = merge_branches(merged, inplace=True)
    folding = fold_norms(merged, run, inplace=True)
    if folding.kept:
        notes.append(f"Norms that were not folded and stay float ({len(folding.kept)}): {listed(folding.kept)}.")
        logger.info(notes[-1])
    for name in find_unknown_multibranch(merged, run):
        kind = type(merged.get_submodule(name)).__name__
        notes.append(
            f"{name} ({kind}) looks like a multi-branch block that is not known; it stays as plain "
            f"convolutions. Teach it with repapq_plugin.register_branches."
        )
        logger.warning(notes[-1])
    merged.eval()  # also what merging made
    return Merged(merged, tuple(folding.pairs), tuple(records), tuple(notes), baked)
