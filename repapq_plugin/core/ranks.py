"""Several processes at one work, through ``torch.distributed`` alone: the few ways in which numbers leave a rank.

Each rank has a share of the data; what is decided from all of it is reduced here, so that every rank ends with the same
tensors. With one process, or no process group, each function hands back what it is given: nothing is copied, nothing is
rounded. What is counted in `traffic` is what a rank gives to its collectives.
"""

from __future__ import annotations

import io
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from repapq_plugin.core.peers import Peers, Work
from repapq_plugin.core.running import is_out_of_memory
from repapq_plugin.errors import RankError, RepAPQError

T = TypeVar("T")


class World(NamedTuple):
    """Which of how many processes this is."""

    rank: int
    size: int


@dataclass
class Traffic:
    """What this rank gave to collectives, by their kind.

    Args:
        calls: How many there were.
        sent: Bytes of the tensors that it gave to them.
    """

    calls: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, tensor: Tensor) -> None:
        """Count one collective."""
        self.calls[kind] += 1
        self.sent[kind] += tensor.numel() * tensor.element_size()


traffic = Traffic()
"""Of this process, since it began."""

_alone: ContextVar[bool] = ContextVar("alone", default=False)
_peers: ContextVar[Peers | None] = ContextVar("peers", default=None)


class ElsewhereError(Exception):
    """What the network's own code raised on another rank."""


def world() -> World:
    """Return this process's place among those that work together; ``(0, 1)`` without a process group."""
    if _alone.get() or not dist.is_available() or not dist.is_initialized():
        return World(0, 1)
    return World(dist.get_rank(), dist.get_world_size())


@contextmanager
def alone() -> Iterator[None]:
    """Let this process work by itself for the time of a ``with`` block, although there is a process group."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


@contextmanager
def together() -> Iterator[None]:
    """Work together for the time of a ``with`` block, which every rank enters: who ends early is noticed by the others.

    Raises:
        RankError: Another rank has ended, has failed, or has not come.
    """
    if world().size == 1 or _peers.get() is not None:
        yield
        return
    peers = Peers(*world())
    token = _peers.set(peers)
    try:
        peers.meet(gather)
        yield
        gather(None)  # nobody leaves before all are done
    except BaseException as error:
        peers.leave(f"{type(error).__name__}: {error}")
        raise
    else:
        peers.leave()
    finally:
        _peers.reset(token)


def sum_(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the sums of tensors over the ranks: one all-reduce for all tensors of one dtype on one device.

    Args:
        tensors: Of the same shapes on each rank.
    """
    return list(tensors) if world().size == 1 else _reduced("sum", tensors)


def greatest(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the largest values of tensors over the ranks, element by element; see `sum_`."""
    return list(tensors) if world().size == 1 else _reduced("max", tensors)


def most(count: int) -> int:
    """Return the largest of a number that each rank has."""
    return max(gather(count))


def gather(value: T) -> list[T]:
    """Return what each rank has, in the order of ranks; tensors come back on the kind of device that they were on."""
    here = world()
    if here.size == 1:
        return [value]
    mine = torch.frombuffer(bytearray(_packed(value)), dtype=torch.uint8)
    sizes = _gathered(torch.tensor([mine.numel()]))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: mine.numel()] = mine
    found = _gathered(padded)
    return [
        value if rank == here.rank else cast(T, _unpacked(part[: int(size)]))
        for rank, (part, size) in enumerate(zip(found, sizes, strict=True))
    ]


def first(work: Callable[[], T], source: int = 0) -> T:
    """Let one rank do something that nobody else has to do, and return on every rank what it got.

    Args:
        work: What it does; is not called on the others.
        source: Its rank.

    Raises:
        RankError: It failed; there its own error is raised.
    """
    here = world()
    if here.size == 1:
        return work()
    made: T | None = None
    error: Exception | None = None
    if here.rank == source:
        try:
            made = work()
        except Exception as raised:
            error = raised
    failed = gather(_told(error))[source]
    if error is not None:
        raise error
    if failed is not None:
        raise RankError(f"Rank {source} stopped: {failed[0]}")
    size = _sent(torch.zeros(1, dtype=torch.int64), source, made)
    packed = _sent(torch.zeros(int(size), dtype=torch.uint8), source, made)
    return cast(T, made if here.rank == source else _unpacked(packed))


def collect(work: Callable[[], T]) -> list[T]:
    """Return what each rank's own work gives, in the order of ranks. If it fails on one rank, it fails on all.

    Raises:
        RankError: On another rank it failed on purpose, or the memory was full.
        ElsewhereError: On another rank the network's own code failed.
    """
    if world().size == 1:
        return [work()]
    made: T | None = None
    error: Exception | None = None
    try:
        made = work()
    except Exception as raised:
        error = raised
    found = gather((made, _told(error)))
    if error is not None:
        raise error
    for rank, (_, told) in enumerate(found):
        if told is not None:
            text, on_purpose = told
            raise (RankError if on_purpose else ElsewhereError)(f"Rank {rank} stopped: {text}")
    return [cast(T, each) for each, _ in found]


def agreed(work: Callable[[], T]) -> T:
    """Do what each rank does by itself, and return what it gave here; see `collect`."""
    if world().size == 1:
        return work()
    made: list[T] = []
    collect(lambda: made.append(work()))
    return made[0]


def reseed(seed: int, step: int) -> None:
    """Let each of several ranks draw its own random numbers, the same in each run, from a step on."""
    here = world()
    if here.size > 1:
        torch.manual_seed(((seed * here.size + here.rank) << 24 | step) % 2**63)


@torch.no_grad()
def level(tensors: Mapping[str, Tensor]) -> None:
    """Give tensors, which ought to be the same on all ranks, the values of rank 0, in place.

    Processors of another kind round differently; so does some software of theirs from run to run.

    Raises:
        RankError: They have other names or shapes on another rank.
    """
    if world().size == 1:
        return
    plain = {name: tensor for name, tensor in tensors.items() if tensor.layout is torch.strided and tensor.numel()}
    told = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in plain.items()]
    wanted = first(lambda: told)
    if (other := next((rank for rank, same in enumerate(gather(told == wanted)) if not same), None)) is not None:
        raise RankError(f"Rank {other} holds another network than rank 0; give every rank the same model and config.")
    for group in _groups(list(plain.values())):
        flat = _flat(group)
        wired = _on_wire(flat.view(torch.uint8))  # whatever they mean
        traffic.add("broadcast", wired)
        _finish(dist.broadcast(wired, 0, async_op=True))
        for tensor, values in zip(group, _parts(wired.to(flat.device).view(flat.dtype), group), strict=True):
            tensor.copy_(values)


def _told(error: Exception | None) -> tuple[str, bool] | None:
    """Return what to say of an error, and whether it ends the work."""
    if error is None:
        return None
    ends = isinstance(error, RepAPQError) or is_out_of_memory(error)
    return f"{type(error).__name__}: {error}", ends


def _reduced(how: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    for group in _groups(tensors):
        flat = _flat(group)
        wired = _on_wire(flat)
        traffic.add("all-reduce", wired)
        operation = dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX
        _finish(dist.all_reduce(wired, operation, async_op=True))
        found.update(zip(map(id, group), _parts(wired.to(flat), group), strict=True))
    return [found[id(tensor)] for tensor in tensors]


def _groups(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return tensors by dtype and device, in an order that is the same on all ranks."""
    groups: dict[tuple[torch.dtype, str], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device.type), []).append(tensor)
    return list(groups.values())


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _parts(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(flat, [tensor.numel() for tensor in like])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _gathered(tensor: Tensor) -> list[Tensor]:
    wired = _on_wire(tensor)
    found = [torch.empty_like(wired) for _ in range(world().size)]
    traffic.add("all-gather", wired)
    _finish(dist.all_gather(found, wired, async_op=True))
    return [each.to(tensor.device) for each in found]


def _sent(empty: Tensor, source: int, value: object) -> Tensor:
    """Return the packed value of one rank, or with an empty int64 tensor its size in bytes."""
    if world().rank == source:
        packed = torch.frombuffer(bytearray(_packed(value)), dtype=torch.uint8)
        empty = packed if empty.dtype == torch.uint8 else torch.tensor([packed.numel()])
    wired = _on_wire(empty)
    traffic.add("broadcast", wired)
    _finish(dist.broadcast(wired, source, async_op=True))
    return wired.to("cpu")


def _finish(work: Work | None) -> None:
    peers = _peers.get()
    if work is None:
        return
    if peers is None:
        work.wait()
    else:
        peers.wait(work)


def _on_wire(tensor: Tensor) -> Tensor:
    """Return a tensor where the process group takes it: NCCL on the rank's own GPU, gloo in host memory."""
    kinds = dist.get_backend()
    if "nccl" in kinds and "gloo" not in kinds:
        return tensor.to(torch.device("cuda", torch.cuda.current_device())).contiguous()
    return tensor.contiguous() if "nccl" in kinds else tensor.cpu().contiguous()


class _Packer(pickle.Pickler):
    """Tensors of an accelerator travel through host memory: each rank has another one."""

    def persistent_id(self, obj: object) -> object:
        if isinstance(obj, Tensor) and obj.device.type != "cpu":
            return obj.detach().cpu(), obj.device.type
        return None


class _Unpacker(pickle.Unpickler):
    def persistent_load(self, pid: tuple[Tensor, str]) -> Tensor:
        tensor, kind = pid
        return tensor.to(kind)


def _packed(value: object) -> bytes:
    stream = io.BytesIO()
    _Packer(stream, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return stream.getvalue()


def _unpacked(data: Tensor) -> object:
    """Return what a rank of the same work packed; nothing else comes this way."""
    return _Unpacker(io.BytesIO(data.cpu().numpy().tobytes())).load()
