"""Replacing modules where they stand, and letting them play another role."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import ClassVar, SupportsIndex, TypeVar, cast

import torch
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


M = TypeVar("M", bound=nn.Module)

_SUBCLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def become(module: nn.Module, role: type[M]) -> M:
    """Let a module play another role, and stay itself: its class becomes a subclass of ``role`` and of its own class.

    ``isinstance`` with its own class, attributes, children, hooks and names stay what they were; methods of ``role`` go
    first and reach the module's own through ``super()``. A role that it plays already is exchanged.

    Args:
        module: Changed in place.
        role: A class that is not instantiated otherwise; it must not define names that the module may use.

    Returns:
        ``module``, as what it now is.
    """
    own = own_class(module)
    key = (role, own)
    if key not in _SUBCLASSES:
        namespace = {"own_class": own, "role": role, "__module__": role.__module__, "__doc__": own.__doc__}
        _SUBCLASSES[key] = type(f"{role.__name__}[{own.__name__}]", (_Playing, role, own), namespace)
    module.__class__ = _SUBCLASSES[key]
    return cast(M, module)


def may_become(module: nn.Module) -> bool:
    """Whether a module can play a role: its class must not pickle itself in a way of its own, as traced modules do."""
    own = own_class(module)
    reduces = own.__reduce__ is not object.__reduce__ or own.__reduce_ex__ is not object.__reduce_ex__
    return not reduces and not isinstance(module, torch.jit.ScriptModule)


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module has without the role that it plays."""
    return type(module).own_class if isinstance(module, _Playing) else type(module)


def resign(module: nn.Module) -> nn.Module:
    """Give a module its own class back; what the role added to it is the caller's to remove."""
    module.__class__ = own_class(module)
    return module


class _Playing:
    """Pickles a module by its own class and its role, which any process can import."""

    own_class: ClassVar[type[nn.Module]]
    role: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        own_state = getattr(self.own_class, "__getstate__", None)  # every class has one from Python 3.11 on
        # A copy: a module that runs at this moment may hold what it does not own.
        state = dict(vars(self)) if own_state in (None, getattr(object, "__getstate__", None)) else own_state(self)
        return _unpickled, (self.own_class, self.role), state


def _unpickled(own: type[nn.Module], role: type[nn.Module]) -> nn.Module:
    return become(own.__new__(own), role)


_REGISTRIES = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
)


def shallow_copy(module: M) -> M:
    """Return a copy that shares children, parameters and buffers, and may be given others."""
    copied = copy.copy(module)
    for name in _REGISTRIES:
        vars(copied)[name] = copy.copy(getattr(module, name))
    return copied


def own_registries(module: M) -> M:
    """Let a module share no registry of children, parameters, buffers and hooks, as one made by ``copy.copy`` does.

    Returns:
        ``module``, changed in place; what the registries hold stays shared.
    """
    for name in (*_REGISTRIES, *_HOOKS):
        vars(module)[name] = copy.copy(getattr(module, name))
    return module


def has_hooks(module: nn.Module) -> bool:
    """Whether forward hooks were put on a module."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def without_hooks(module: M) -> M:
    """Return a `shallow_copy` that runs the module's own forward without its own hooks; its children keep theirs."""
    copied = shallow_copy(module)
    for name in _HOOKS:
        vars(copied)[name] = type(getattr(module, name))()
    return copied
