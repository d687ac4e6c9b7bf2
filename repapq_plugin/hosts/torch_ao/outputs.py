"""Outputs that torch.ao's integer layers need a grid for, and that the calibration knows nothing of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from repapq_plugin.core.copies import own_batch
from repapq_plugin.core.hooks import Hooks
from repapq_plugin.core.quant_primitives import activation_bounds
from repapq_plugin.core.running import Batch, ForwardFn
from repapq_plugin.errors import CalibrationError
from repapq_plugin.observers import MinMaxObserver
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize

STORED_BOUNDS = activation_bounds(8)
"""Grid of what is quantized for torch.ao's sake alone."""

OFF_TIES = 1.001
"""Widens those grids: an observed bound is itself a sum of integer products, so that other sums would lie
exactly between two codes, where a float and an integer rounding part (our choice)."""


def output_quantizer(**_: object) -> LearnableFakeQuantize:
    """Return a new quantizer for an output that no quantized layer reads directly."""
    low, high = STORED_BOUNDS
    return LearnableFakeQuantize(
        observer=MinMaxObserver, dtype=torch.quint8, qscheme=torch.per_tensor_affine, quant_min=low, quant_max=high
    )


@torch.no_grad()
def find_ranges(prepared: nn.Module, data: Iterable[Batch], forward: ForwardFn) -> None:
    """Run ``data`` for the quantizers that still observe, then end all observing.

    Args:
        prepared: Holds them; changed in place.
        data: Batches.
        forward: Runs the network on one.

    Raises:
        CalibrationError: ``data`` is empty.
    """
    waiting = [m for m in prepared.modules() if isinstance(m, LearnableFakeQuantize) and m.observing]
    for quantizer in waiting:
        quantizer.enable_observer(False)
        quantizer.enable_fake_quant(False)
    batches = 0
    with Hooks() as hooks:
        for quantizer in waiting:
            hooks.before(quantizer, _observe)
        for batch in data:
            forward(prepared, own_batch(batch))  # which it may change
            batches += 1
    if not batches:
        raise CalibrationError("The data for the ranges of outputs holds no batch; give at least one.")
    for quantizer in waiting:
        scale, zero_point = quantizer.activation_post_process.calculate_qparams()
        quantizer.set_qparams(scale * OFF_TIES, zero_point)
        quantizer.enable_fake_quant(True)


def _observe(quantizer: nn.Module, args: tuple[Tensor, ...]) -> None:
    cast(LearnableFakeQuantize, quantizer).activation_post_process(args[0])
