"""Processes that a launcher has started become one group, as mmengine does it: NCCL on GPUs, gloo elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping

import torch
import torch.distributed as dist
from mmengine.dist import init_dist

from repapq_plugin.errors import HostError

NEEDED: Mapping[str, tuple[str, ...]] = {
    "pytorch": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NODELIST"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "MASTER_ADDR"),
}
"""Variables that each launcher sets: the rank first, then the number of ranks."""

STARTS = {"pytorch": "torchrun", "slurm": "srun", "mpi": "mpirun"}
"""What starts processes with them."""


def check_environment(launcher: str, environment: Mapping[str, str]) -> None:
    """Make sure that a launcher has said all that a process must know.

    Args:
        launcher: One of `NEEDED`, or ``"none"``.
        environment: The process's.

    Raises:
        HostError: A variable is missing or makes no sense; the message names it.
    """
    if launcher == "none":
        if environment.get("RANK") and environment.get("WORLD_SIZE", "1") != "1":
            raise HostError(
                f"WORLD_SIZE={environment['WORLD_SIZE']!r} and RANK={environment['RANK']!r} say that this is one of "
                "several processes; give --launcher pytorch, or start one process."
            )
        return
    if launcher not in NEEDED:
        raise HostError(f"--launcher {launcher!r} is not known; choose none, {', '.join(NEEDED)}.")
    missing = [name for name in NEEDED[launcher] if not environment.get(name)]
    if missing:
        raise HostError(
            f"--launcher {launcher} needs {', '.join(missing)} in the environment, which {STARTS[launcher]} sets; "
            "start with that, or leave --launcher out."
        )
    numbers = {}
    for name in NEEDED[launcher]:
        if not name.startswith(("MASTER_ADDR", "SLURM_NODELIST")):
            if not environment[name].isdecimal():
                raise HostError(f"{name}={environment[name]!r} is not allowed with --launcher {launcher}; it counts.")
            numbers[name] = int(environment[name])
    rank, size = NEEDED[launcher][:2]
    if numbers[rank] >= numbers[size]:
        raise HostError(f"{rank}={numbers[rank]} is not allowed with {size}={numbers[size]}; ranks count from 0.")


def join_group(launcher: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Join the process group of a launcher, unless this process is in one already; ``"none"`` joins none.

    Raises:
        HostError: See `check_environment`; or nobody says where the first rank is.
    """
    check_environment(launcher, environment)
    if launcher == "none" or dist.is_initialized():
        return
    if torch.cuda.is_available():
        init_dist(launcher, backend="nccl")
        return
    # mmengine's own way sets a GPU.
    rank, size = NEEDED[launcher][:2]
    environment.setdefault("RANK", environment[rank])
    environment.setdefault("WORLD_SIZE", environment[size])
    environment.setdefault("MASTER_PORT", "29500")
    nodes = environment.get("SLURM_NODELIST", "")
    if "MASTER_ADDR" not in environment and not set(nodes) & set("[,"):
        environment["MASTER_ADDR"] = nodes
    if not environment.get("MASTER_ADDR"):
        raise HostError(f"MASTER_ADDR is not set, and SLURM_NODELIST={nodes!r} names several; set it to the first.")
    dist.init_process_group("gloo")


def launcher_in(words: list[str]) -> str:
    """Return what ``--launcher`` says among the words of a toolbox's tool; ``"none"`` if it is not there."""
    for place, word in enumerate(words):
        if word.startswith("--launcher="):
            return word.partition("=")[2]
        if word == "--launcher" and place + 1 < len(words):
            return words[place + 1]
    return "none"
