"""Weights that are computed whenever they are read (weight norm, weight mean) become plain ones."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize


def bake_parametrizations(model: nn.Module) -> list[str]:
    """Replace every parametrized tensor of ``model`` by the value that it has at inference, in place.

    Torch's own removal takes the property off the class, which a copy shares with what it was copied from; here the
    copy gets its plain class back, and the class stays as it is.

    Args:
        model: A network, in evaluation mode.

    Returns:
        Names of those tensors.
    """
    baked = []
    for path, module in list(model.named_modules()):
        if not parametrize.is_parametrized(module):
            continue
        values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        for name, value in values.items():
            setattr(module, name, nn.Parameter(value))
            baked.append(f"{path}.{name}" if path else name)
    return baked
