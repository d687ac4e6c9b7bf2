"""Activations kept between passes, within a budget of host memory; the rest goes to disk."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from repapq_plugin.core.files import ScratchFolder, remove_orphans

PREFIX = "repapq-cache-"
"""What the names of folders with activations begin with."""

K = TypeVar("K", bound=Hashable)


class ActivationCache(Generic[K]):
    """Lists of tensors by ``(name, batch)``; use it as a context manager, so that files vanish.

    Files of a process that was killed vanish when the next cache is used in the same place.

    Tensors come back on the device they were put from, always as a copy: an in-place activation
    behind a unit must not reach the cache.

    Args:
        budget: Host memory for tensors, in bytes; what comes after it is full goes to disk.
        folder: Where the temporary folder is made; default: the system's.
    """

    def __init__(self, budget: int, folder: str | None = None) -> None:
        self.budget = budget
        self.used = 0
        self._memory: dict[tuple[K, int], list[Tensor]] = {}
        self._files: dict[tuple[K, int], tuple[Path, torch.device]] = {}
        self._devices: dict[tuple[K, int], torch.device] = {}
        self._folder: ScratchFolder | None = None
        self._parent = folder
        self._count = 0

    def put(self, name: K, batch: int, tensors: list[Tensor]) -> None:
        """Keep ``tensors`` (detached copies) under ``(name, batch)``, replacing what was there."""
        self.drop(name, batch)
        key = (name, batch)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        device = tensors[0].device if tensors else torch.device("cpu")
        host = [tensor.detach().to("cpu", copy=True).contiguous() for tensor in tensors]
        if self.used + size <= self.budget:
            self._memory[key], self._devices[key] = host, device
            self.used += size
            return
        if self._folder is None:
            self._folder = ScratchFolder(PREFIX, self._parent)
        path = self._folder.path / f"{self._count}.safetensors"
        self._count += 1
        save_file({str(index): tensor for index, tensor in enumerate(host)}, path)
        self._files[key] = (path, device)

    def get(self, name: K, batch: int) -> list[Tensor]:
        """Return copies of what was put under ``(name, batch)``.

        Raises:
            KeyError: Nothing was put there.
        """
        key = (name, batch)
        if key in self._memory:
            return [tensor.to(self._devices[key], copy=True) for tensor in self._memory[key]]
        path, device = self._files[key]
        loaded = load_file(path)
        return [loaded[str(index)].to(device) for index in range(len(loaded))]

    def __contains__(self, key: tuple[K, int]) -> bool:
        return key in self._memory or key in self._files

    def drop(self, name: K, batch: int) -> None:
        """Forget ``(name, batch)`` if it is there."""
        key = (name, batch)
        held = self._memory.pop(key, None)
        if held is not None:
            self.used -= sum(tensor.numel() * tensor.element_size() for tensor in held)
        file = self._files.pop(key, None)
        if file is not None:
            file[0].unlink(missing_ok=True)

    def drop_all(self, name: K) -> None:
        """Forget every batch of ``name``."""
        for key in [key for key in (*self._memory, *self._files) if key[0] == name]:
            self.drop(*key)

    def drop_everything(self) -> None:
        """Forget all."""
        for key in [*self._memory, *self._files]:
            self.drop(*key)

    def __enter__(self) -> ActivationCache[K]:
        remove_orphans(PREFIX, self._parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._memory.clear()
        self._files.clear()
        self.used = 0
        if self._folder is not None:
            self._folder.remove()
            self._folder = None
