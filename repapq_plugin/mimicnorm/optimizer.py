"""The optimizer of a training with MimicNorm, as its recipe says."""

from __future__ import annotations

import torch
from torch import nn

from repapq_plugin.mimicnorm.recipe import RecipeLike, find_recipe


def make_sgd(
    model: nn.Module,
    rate: float,
    *,
    weight_decay: float = 5e-4,
    momentum: float = 0.9,
    recipe: RecipeLike = "default",
) -> torch.optim.SGD:
    """Return stochastic gradient descent for all parameters of a model.

    Args:
        model: A network; `WeightMean` is attached to what comes out.
        rate: The learning rate.
        weight_decay: For what `Recipe.decay` names; the rest has none. ``"weights"`` are parameters of two dimensions
            or more, not biases, norms and branch scalars. The authors take 5e-4 for CIFAR and 1e-4 for ImageNet.
        momentum: Looks ahead if `Recipe.nesterov` says so.
        recipe: That of `convert`.

    Raises:
        ConfigError: There is no such recipe.
    """
    chosen = find_recipe(recipe)
    everything = list(model.parameters())
    decayed = [parameter for parameter in everything if chosen.decay == "all" or parameter.dim() > 1]
    others = [parameter for parameter in everything if chosen.decay != "all" and parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(
        [group for group in groups if group["params"]], lr=rate, momentum=momentum, nesterov=chosen.nesterov
    )
