"""The across-block loss: each unit's error, and the error at the end of its stage.

Source: arXiv:2402.16121 (abstract): the stage output supervises, because the gradient of MAE alone
knows signs and no magnitudes, and because it ties neighbours' quantization parameters together. That
every term is divided by the magnitude of its target, and that units are averaged, is our choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from repapq_plugin.core.losses import LOSSES, magnitude


def relative_loss(outputs: Sequence[Tensor], targets: Sequence[Tensor], loss: str) -> Tensor:
    """Return the mean over tensors of ``loss(output, target) / loss(0, target)``, a scalar.

    Args:
        outputs: Tensors of any shapes: the calls of a unit, or the outputs of a network.
        targets: The float network's tensors, of the same shapes.
        loss: ``"mae"`` or ``"mse"``.
    """
    terms = [
        LOSSES[loss](output, target) / magnitude(target, loss)
        for output, target in zip(outputs, targets, strict=True)
        if target.numel()
    ]
    return torch.stack(terms).mean() if terms else torch.zeros(())


def across_block_loss(
    units: Mapping[str, Sequence[Tensor]],
    unit_targets: Mapping[str, Sequence[Tensor]],
    stage: Sequence[Tensor],
    stage_targets: Sequence[Tensor],
    loss: str,
    stage_weight: float,
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss that is minimised, and each unit's own part of it.

    Args:
        units: Outputs of the units being calibrated, call after call.
        unit_targets: The float network's outputs of the same units.
        stage: Outputs at the end of the stage; empty where it ends with its only unit.
        stage_targets: The float network's outputs there.
        loss: ``"mae"`` or ``"mse"``.
        stage_weight: Weight of the stage term against the mean of the unit terms.
    """
    parts = {name: relative_loss(outputs, unit_targets[name], loss) for name, outputs in units.items()}
    total = torch.stack(list(parts.values())).mean()
    if stage_weight and stage:
        total = total + stage_weight * relative_loss(stage, stage_targets, loss)
    return total, {name: float(part.detach()) for name, part in parts.items()}
