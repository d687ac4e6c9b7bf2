"""Wrappers of training on many processes, around a part or all of a network; the one process here is all there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard


@contextmanager
def process_group() -> Iterator[None]:
    """Open a group of this process alone, and close it."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def replicated(module: nn.Module) -> nn.Module:
    """Return a module that all processes hold."""
    return nn.parallel.DistributedDataParallel(module)


def sharded(module: nn.Module) -> nn.Module:
    """Return a module of which each process holds a share, in its first form."""
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"))


def sharded_in_place(module: nn.Module) -> nn.Module:
    """Return a module whose parameters are spread over the processes."""
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    return module
