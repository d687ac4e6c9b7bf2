"""Replacing modules where they stand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import nn


def places_of(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return every place of ``module`` inside ``model``: its parent, and its name there."""
    return [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is module]


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put other modules in the places of some, wherever each stands; what is put in is not looked into.

    Args:
        model: Changed in place.
        replacements: New modules by the old ones.

    Returns:
        ``model``, or what replaces it if it is to be replaced itself.
    """
    if model in replacements:
        return replacements[model]
    new = set(replacements.values())
    for parent in [module for module in model.modules() if module not in new]:
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    return model


def parameter_uses(model: nn.Module) -> Counter[int]:
    """Return by ``id`` of each parameter how many modules of ``model`` hold it."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
