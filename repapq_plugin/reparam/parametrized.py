"""Weights that are computed whenever they are read, or before each call, become plain ones.

Weight norm, spectral norm and pruning are of this kind, as parametrizations and as hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm

from repapq_plugin.core.modules import shallow_copy

M = TypeVar("M", bound=nn.Module)

_HOOKS: dict[type, tuple[str, Callable[[nn.Module, str], object]]] = {
    WeightNorm: ("name", remove_weight_norm),
    SpectralNorm: ("name", remove_spectral_norm),
    prune.BasePruningMethod: ("_tensor_name", prune.remove),
}
"""By the class of a hook: its attribute that names the tensor, and what computes that once more and takes it off."""


@torch.no_grad()
def bake_parametrizations(model: nn.Module) -> list[str]:
    """Replace every computed tensor of ``model`` by the value that it has at inference, in place.

    Torch's own removal of parametrizations takes the property off the class, which a copy shares with what it was
    copied from; here the copy gets its plain class back, and the class stays as it is. A hook computes the tensor anew:
    what a module holds may be older than the parameters that were loaded into it. A layer's weight that is kept as a
    buffer becomes a parameter.

    Args:
        model: A network, in evaluation mode.

    Returns:
        Names of those tensors.
    """
    baked = []
    for path, module in list(model.named_modules()):
        names = [*_bake_parametrized(module), *_bake_hooked(module), *_bake_buffers(module)]
        baked += [f"{path}.{name}" if path else name for name in names]
    return baked


def with_computed_tensors(module: M) -> M:
    """Return a module whose tensors are what hooks of these kinds would compute before its next call.

    Args:
        module: Left as it is.

    Returns:
        The module itself if it has no such hook, else a shallow copy of it.
    """
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, tuple(_HOOKS))]
    if not hooks:
        return module
    computed = shallow_copy(module)
    computed.training = False
    for hook in hooks:
        hook(computed, ())
    return computed


def _bake_parametrized(module: nn.Module) -> list[str]:
    if not parametrize.is_parametrized(module):
        return []
    values = {
        name: getattr(module, name).detach().clone() for name in list(cast(nn.ModuleDict, module.parametrizations))
    }
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, value in values.items():
        setattr(module, name, nn.Parameter(value))
    return list(values)


def _bake_hooked(module: nn.Module) -> list[str]:
    baked: list[str] = []
    for hook in list(module._forward_pre_hooks.values()):
        for kind, (attribute, remove) in _HOOKS.items():
            if isinstance(hook, kind):
                name = str(getattr(hook, attribute))
                if name not in vars(module):
                    # torch takes it off before it puts the parameter there.
                    setattr(module, name, None)
                remove(module, name)
                baked.append(name)
    for key, hook in list(module._load_state_dict_pre_hooks.items()):
        # torch leaves this one, which asks a state dict for what is no longer there.
        if isinstance(getattr(hook, "hook", hook), SpectralNormLoadStateDictPreHook):
            del module._load_state_dict_pre_hooks[key]
    return baked


def _bake_buffers(module: nn.Module) -> list[str]:
    """Make parameters of weight and bias that a convolution or linear layer keeps as buffers."""
    if not isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
        return []
    values = {name: module._buffers.get(name) for name in ("weight", "bias")}
    found = {name: value for name, value in values.items() if value is not None and value.is_floating_point()}
    for name, value in found.items():
        delattr(module, name)
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return list(found)
