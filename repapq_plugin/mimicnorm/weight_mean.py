"""Weight mean: every output filter keeps a mean of zero (arXiv:2010.09278, "weight mean operation").

Behind a ReLU all inputs share a positive mean, which a filter of mean zero does not pass on: activations of
different samples stay uncorrelated, as a batch norm would leave them. Two ways to it, equal under plain gradient
descent, with momentum and weight decay too, because the projection is linear: `WeightMean` projects the weights
after each step, `parametrize_weight_mean` projects them whenever they are read.
"""

from __future__ import annotations

import math
from typing import TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from repapq_plugin.errors import ConfigError
from repapq_plugin.mimicnorm.recipe import RecipeLike, find_recipe

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
"""What MimicNorm counts as a layer."""


def fan_in(layer: Layer) -> int:
    """Return how many products a convolution or linear layer sums for one output."""
    return math.prod(layer.weight.shape[1:])


def is_depthwise(layer: Layer) -> bool:
    """Tell whether each output channel reads one input channel."""
    return getattr(layer, "groups", 1) > 1 and layer.weight.shape[1] == 1


def takes_weight_mean(module: nn.Module, recipe: RecipeLike = "default") -> TypeGuard[Layer]:
    """Tell whether a module is a convolution or linear layer whose filters keep a mean of zero by a recipe.

    Depthwise layers never do.

    Args:
        module: Any module.
        recipe: `Recipe.min_fan_in` and `Recipe.linear_mean` decide.

    Raises:
        ConfigError: It is lazy, so its fan-in is not known yet; or there is no such recipe.
    """
    chosen = find_recipe(recipe)
    if not isinstance(module, Layer):
        return False
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        raise ConfigError(
            f"A {type(module).__name__} has no weights yet; run the model once on a batch before MimicNorm is set up."
        )
    if isinstance(module, nn.Linear) and not chosen.linear_mean:
        return False
    return not is_depthwise(module) and fan_in(module) > chosen.min_fan_in


def without_filter_means(weight: Tensor) -> Tensor:
    """Return ``weight``, ``[out_channels, ...]``, less each filter's mean, computed in float32 at least."""
    wide = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
    return (wide - wide.mean(dim=tuple(range(1, weight.dim())), keepdim=True)).to(weight.dtype)


class WeightMean:
    """Subtracts filter means from a model's weights, by itself after each step of an optimizer.

    Frozen weights stay as they are: a pretrained part computes what it did.

    Args:
        model: Its convolutions and linear layers are those that `takes_weight_mean` names.
        recipe: That of `convert`.

    Raises:
        ConfigError: A weight is computed by a parametrization of another kind; or there is no such recipe.

    Example:
        >>> handle = WeightMean(model).attach(optimizer)   # handle.remove() ends it
    """

    def __init__(self, model: nn.Module, recipe: RecipeLike = "default") -> None:
        chosen = find_recipe(recipe)
        layers: dict[int, Layer] = {}
        for name, layer in model.named_modules():
            if not takes_weight_mean(layer, chosen):
                continue
            if parametrize.is_parametrized(layer, "weight") and not _projected(layer):
                raise ConfigError(
                    f"The weight of {name} is computed by a parametrization, so that no step can change it; use "
                    "parametrize_weight_mean(model)."
                )
            # A weight that two layers share counts once; a computed one is a new tensor at each look.
            layers.setdefault(id(layer) if _projected(layer) else id(layer.weight), layer)
        self.layers = list(layers.values())

    @torch.no_grad()
    def apply(self) -> None:
        """Subtract the means now."""
        for layer in self.layers:
            if layer.weight.requires_grad:
                layer.weight.copy_(without_filter_means(layer.weight))

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Subtract the means now and after each step.

        Returns:
            A handle whose ``remove()`` ends it.
        """
        self.apply()
        return optimizer.register_step_post_hook(lambda *_: self.apply())


class FilterMeanFree(nn.Module):
    """The projection as a parametrization of ``weight``."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight that the layer computes with."""
        return without_filter_means(weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return what is stored if ``weight`` is assigned."""
        return without_filter_means(weight)


def _parametrizations(module: nn.Module) -> list[nn.Module]:
    """Return what computes a module's ``weight``, in order; nothing where it is stored."""
    if not parametrize.is_parametrized(module, "weight"):
        return []
    return list(cast(nn.ModuleList, cast(nn.ModuleDict, module.parametrizations)["weight"]))


def _projected(module: nn.Module) -> bool:
    return any(isinstance(last, FilterMeanFree) for last in _parametrizations(module)[-1:])


def parametrize_weight_mean(model: nn.Module, recipe: RecipeLike = "default") -> list[str]:
    """Let every layer that `takes_weight_mean` read its weights through the projection, in place.

    Args:
        model: The network; changed.
        recipe: That of `convert`.

    Returns:
        Module paths of those layers; frozen ones are left alone.

    Raises:
        ConfigError: Layers share a weight, which a parametrization would part; take `WeightMean` instead.
    """
    rules = find_recipe(recipe)
    chosen = {
        name: module
        for name, module in model.named_modules()
        if takes_weight_mean(module, rules) and module.weight.requires_grad
    }
    owners: dict[int, str] = {}
    for name, module in chosen.items():
        if parametrize.is_parametrized(module, "weight"):
            continue
        other = owners.setdefault(id(module.weight), name)
        if other != name:
            raise ConfigError(
                f"{name} and {other} share one weight, which a parametrization would part; use WeightMean(model)."
            )
    for module in chosen.values():
        if not _projected(module):
            parametrize.register_parametrization(module, "weight", FilterMeanFree())
    return list(chosen)


def remove_weight_mean(model: nn.Module) -> None:
    """Turn parametrized weights into plain ones of the same values, in place."""
    for module in list(model.modules()):
        if len(_parametrizations(module)) == 1 and _projected(module):
            parametrize.remove_parametrizations(module, "weight")
