"""The tensors inside whatever a network is given or returns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import cast

from torch import Tensor


def members_of(value: object) -> list[object] | None:
    """Return what a container holds, in order: sequence, mapping, dataclass, object with ``items()``; else None."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, type):
        return None
    if is_dataclass(value):
        return [getattr(value, field.name) for field in fields(value)]
    items = getattr(value, "items", None)
    if callable(items):  # mmengine's data elements
        return [member for _, member in cast("Iterator[tuple[object, object]]", items())]
    return None


def tensors_of(value: object, *also: type) -> list[Tensor]:
    """Return the tensors of nested containers in order (see `members_of`).

    Args:
        value: A tensor, a container, or anything else (which holds none).
        *also: Further classes that count as tensors: what stands for one in a trace.
    """
    if isinstance(value, (Tensor, *also)):
        return [cast(Tensor, value)]
    return [tensor for member in members_of(value) or () for tensor in tensors_of(member, *also)]


def floating_tensors(value: object) -> list[Tensor]:
    """Return the floating-point ones of `tensors_of`."""
    return [tensor for tensor in tensors_of(value) if tensor.is_floating_point()]


def with_tensors(template: object, tensors: Iterator[Tensor]) -> object:
    """Return containers like ``template`` with other tensors, in the order of `tensors_of`.

    Sequences, mappings and dataclasses are made anew; any other object is returned as it is.
    """
    if isinstance(template, Tensor):
        return next(tensors)
    if isinstance(template, Mapping):
        members = {key: with_tensors(member, tensors) for key, member in template.items()}
        if type(template) is dict or not isinstance(template, MutableMapping):
            return members
        mapping = copy.copy(template)
        mapping.update(members)
        return mapping
    if is_dataclass(template) and not isinstance(template, type):
        changed = {field.name: with_tensors(getattr(template, field.name), tensors) for field in fields(template)}
        made = copy.copy(template)
        for name, value in changed.items():
            object.__setattr__(made, name, value)  # a frozen one too
        return made
    if isinstance(template, list | tuple):
        values = [with_tensors(member, tensors) for member in template]
        named = hasattr(template, "_fields")  # a NamedTuple takes its members one by one
        make = cast("Callable[..., object]", type(template))
        return make(*values) if named else make(values)
    return template


def first_tensor(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Tensor | None:
    """Return the first tensor among the arguments of a call; by position first, then by keyword."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def change_first_tensor(
    args: tuple[object, ...], kwargs: Mapping[str, object], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return the arguments of a call with `first_tensor` changed; the same where there is none."""
    for index, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:index], change(value), *args[index + 1 :]), dict(kwargs)
    for key, value in kwargs.items():
        if isinstance(value, Tensor):
            return args, {**kwargs, key: change(value)}
    return args, dict(kwargs)
