"""The tensors inside whatever a network is given or returns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import TypeVar, cast

from torch import Tensor

T = TypeVar("T")


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


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place; 0 for those of inference mode, which do not count."""
    return 0 if tensor.is_inference() else tensor._version


def floating_tensors(value: object) -> list[Tensor]:
    """Return the floating-point ones of `tensors_of`."""
    return [tensor for tensor in tensors_of(value) if tensor.is_floating_point()]


def with_tensors(template: object, tensors: Iterator[Tensor]) -> object:
    """Return containers like ``template`` with other tensors, in the order of `tensors_of` (see `rebuilt`)."""
    if isinstance(template, Tensor):
        return next(tensors)
    return rebuilt(template, lambda member: with_tensors(member, tensors))


def rebuilt(container: T, change: Callable[[object], object]) -> T:
    """Return a container like ``container`` that holds ``change(member)`` for each member, in order.

    Sequences, mappings and dataclasses are made anew, a mapping that cannot be changed as a dict; any other object is
    returned as it is.
    """
    if isinstance(container, Mapping):
        members = {key: change(member) for key, member in container.items()}
        if type(container) is dict or not isinstance(container, MutableMapping):
            return cast(T, members)
        mapping = copy.copy(container)
        for key, member in members.items():
            mapping[key] = member  # some classes refuse ``update``
        return cast(T, mapping)
    if is_dataclass(container) and not isinstance(container, type):
        made = copy.copy(container)
        for field in fields(container):
            object.__setattr__(made, field.name, change(getattr(container, field.name)))  # a frozen one too
        return cast(T, made)
    if isinstance(container, list | tuple):
        values = [change(member) for member in container]
        named = hasattr(container, "_fields")  # a NamedTuple takes its members one by one
        make = cast("Callable[..., T]", type(container))
        return make(*values) if named else make(values)
    return container


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
