"""Grids of fewer than 8 bits, carried exactly by 8-bit integers.

pt2e keeps ``quant_min`` and ``quant_max`` in its quantize operators, but what turns them into integer
kernels (inductor's patterns) reads scale and zero point only. So an activation is clamped to the range
of its grid and then quantized by 8 bits of the same step.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import nn
from torch.fx import GraphModule, Node

from repapq_plugin.core.quant_primitives import CONTAINERS, grid_bounds
from repapq_plugin.hosts.pt2e._compat import copy_facts
from repapq_plugin.hosts.pt2e.fake_quantize import LearnableFakeQuantize
from repapq_plugin.hosts.pt2e.graph import quantizer_at
from repapq_plugin.hosts.pt2e.observers import TorchaoObserver

PER_TENSOR = (torch.per_tensor_affine, torch.per_tensor_symmetric)


def carry_grid(prepared: GraphModule) -> GraphModule:
    """Make a prepared and calibrated graph survive the lowering to integer kernels, whatever its bits.

    Args:
        prepared: From ``prepare_pt2e`` or ``prepare_qat_pt2e`` with our classes, after calibration;
            changed in place. With fake quantizers it computes what it did before.

    Returns:
        ``prepared``, for ``convert_pt2e``.
    """
    for node in list(prepared.graph.nodes):
        quantizer = quantizer_at(prepared, node)
        if not isinstance(quantizer, LearnableFakeQuantize | TorchaoObserver) or quantizer.qscheme not in PER_TENSOR:
            continue
        stored = CONTAINERS[cast(torch.dtype, quantizer.dtype)]
        if (quantizer.quant_min, quantizer.quant_max) == stored:
            continue
        qparams = quantizer.calculate_qparams()
        _clamp_before(prepared, node, grid_bounds(*qparams, quantizer.quant_min, quantizer.quant_max))
        name = f"{node.target}_carried"
        if name not in dict(prepared.named_modules()):
            prepared.add_submodule(name, _widened(quantizer, stored))
        node.target = name
    prepared.delete_all_unused_submodules()
    prepared.recompile()
    return prepared


def _clamp_before(prepared: GraphModule, node: Node, bounds: tuple[float, float]) -> None:
    source = cast(Node, node.args[0])
    with prepared.graph.inserting_before(node):
        clamp = prepared.graph.call_function(torch.ops.aten.clamp.default, (source, *bounds))
    copy_facts(source, clamp, with_modules=True)
    node.update_arg(0, clamp)


def _widened(quantizer: LearnableFakeQuantize | TorchaoObserver, stored: tuple[int, int]) -> nn.Module:
    """Return a quantizer of the same step and zero point on the whole grid of its type."""
    if isinstance(quantizer, LearnableFakeQuantize):
        wide = copy.deepcopy(quantizer)
        wide.enable_observer(False)
    else:
        wide = LearnableFakeQuantize(dtype=quantizer.dtype, qscheme=quantizer.qscheme)
        wide.enable_observer(False)
        wide.set_qparams(*quantizer.calculate_qparams())
    wide.quant_min, wide.quant_max = stored
    return wide
