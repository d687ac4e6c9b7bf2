"""Real processes that calibrate together, over gloo, one thread each."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]

PRELOADED = ["torch._dynamo", "repapq_plugin", "tests.support.networks", "tests.support.killing"]
"""What the process imports once from which all others are forked."""

LONGEST = 900.0
"""Seconds after which processes are given up."""


@dataclass(frozen=True)
class Ended:
    """How one rank ended.

    Args:
        value: What its function returned.
        error: What it raised instead, as class name and text; empty if it did not.
        at: When, by ``time.monotonic``, which all processes share.
        status: Of its process; negative: the signal that killed it.
    """

    value: Any
    error: str
    at: float
    status: int


def on_ranks(size: int, function: Callable[..., object], *args: object) -> list[Ended]:
    """Call ``function(rank, *args)`` in ``size`` processes of one process group; return how each ended.

    Args:
        size: Number of processes; one has no process group.
        function: Stands in a module, as it is called elsewhere; what it returns can be saved by torch.
        *args: Can be pickled.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        processes = [
            context.Process(target=_run, args=(rank, size, folder, function, args), daemon=True) for rank in range(size)
        ]
        # The process that others are forked from does not learn where its parent imports from.
        with patch.dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])):
            for process in processes:
                process.start()
        ended = []
        for rank, process in enumerate(processes):
            process.join(max(0.0, started + LONGEST - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
            ended.append(_ended(Path(folder), rank, process.exitcode or 0))
        return ended


def values(size: int, function: Callable[..., object], *args: object) -> list[Any]:
    """Return what ``function`` returned on each rank, all of which come to their end (see `on_ranks`)."""
    ended = on_ranks(size, function, *args)
    assert all(not each.error and each.status == 0 for each in ended), [each.error or each.status for each in ended]
    return [each.value for each in ended]


def _ended(folder: Path, rank: int, status: int) -> Ended:
    path = folder / f"{rank}.pt"
    if not path.exists():
        return Ended(None, "", 0.0, status)
    value, error, at = torch.load(path, weights_only=False)
    return Ended(value, error, at, status)


def _run(rank: int, size: int, folder: str, function: Callable[..., object], args: Sequence[object]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if size > 1:
        # As torchrun does; the address is not used, for the group is there already.
        told = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
        os.environ.update({name: str(value) for name, value in told.items()})
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size)
    value, error = None, ""
    try:
        value = function(rank, *args)
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
        if os.environ.get("SHOW_RANKS"):
            traceback.print_exc()
    path = Path(folder) / f"{rank}.pt"
    torch.save((value, error, time.monotonic()), path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
    if not error and size > 1:
        dist.destroy_process_group()
