"""A second device that is only pretended: tensors of it must not meet others, as on a real one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

HERE, THERE = torch.device("cpu"), torch.device("cpu", 1)

# What copies from one device to the other, or takes indices, which may be here.
MAY_MEET = {"to", "copy_", "type_as", "__getitem__", "__setitem__"}
# What torch asks about two tensors when it makes a module's parameters, and what is copied into a memo.
NO_ARITHMETIC = {"_has_compatible_shallow_copy_type", "__set__", "__deepcopy__", "set_data"}


def tensors_in(value: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class MovedAway(TorchFunctionMode):
    """Inside, the tensors of some modules are there, and so is all that is made of them or for their device.

    Anything else is here. Here and there never meet, but for tensors of no dimension, in copies and as indices.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self._there: set[int] = set()
        self._alive: list[Tensor] = []
        for module in modules:
            self._put([*module.parameters(), *module.buffers()])

    def _put(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            # By its memory: a parameter made of a tensor, or a view of it, is where that is.
            if not tensor.is_meta:
                self._there.add(self._place(tensor))
                self._alive.append(tensor)

    @staticmethod
    def _place(tensor: Tensor) -> int:
        return tensor.untyped_storage().data_ptr() if tensor.numel() else id(tensor)

    def is_there(self, tensor: Tensor) -> bool:
        return not tensor.is_meta and self._place(tensor) in self._there

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        given = tensors_in([args[:1] if name in NO_ARITHMETIC else args, kwargs])
        there = [tensor for tensor in given if self.is_there(tensor)]
        if getattr(func, "__self__", None) is Tensor.device:
            return THERE if there else func(*args, **kwargs)
        here = [tensor for tensor in given if not self.is_there(tensor) and tensor.dim() and tensor.numel()]
        if there and here and name not in MAY_MEET | NO_ARITHMETIC:
            raise RuntimeError(f"{name}: tensors are expected to be on the same device, but some are here, some there")
        asked = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.device | str | Tensor)]
        arrives = any(value is not None and self._names_there(value) for value in asked if name == "to" or _is(value))
        leaves = not arrives and name in ("to", "cpu") and (name == "cpu" or bool(asked))
        args, kwargs = tree_map(lambda value: HERE if _is(value) and value == THERE else value, (args, kwargs))
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and (arrives or leaves) and args and result is args[0]:
            result = result.clone()  # on a real device it is another tensor
        if arrives or (there and not leaves):
            self._put(tensors_in(result))
        return result

    def _names_there(self, value: object) -> bool:
        return self.is_there(value) if isinstance(value, Tensor) else value == THERE


def _is(value: object) -> bool:
    return isinstance(value, torch.device)
