"""Calibrations in processes of their own, killed by the system at some moment, and gone on with by another process.

A server imports what a calibration needs, once, and forks a process for each. Started as a module, this is the server.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.core import checkpoints, part_files
from repapq_plugin.result import Calibrated
from tests.support.networks import Chain, settle

SEED_OF_NETWORK, SEED_OF_DATA = 1, 2

STAYS = {checkpoints.MANIFEST, checkpoints.LOCK}
"""What may stand in a checkpoint folder beside finished parts."""


class Entry(Protocol):
    """Calibrates something small, always in the same way."""

    def __call__(self, folder: Path, schedule: str) -> Calibrated:
        """Go on with what ``folder / "checkpoint"`` keeps, or begin; other files go to ``folder`` too."""


def small_config(schedule: str, **keys: object) -> RepAPQConfig:
    """Return a configuration that visits all that an interruption may disturb: spilled activations, every phase."""
    more = {} if schedule == "network" else {"network_steps": 6}
    return RepAPQConfig.from_preset("w4a4", **{"steps": 6, "schedule": schedule, "cache_bytes": 40_000, **more, **keys})


def plain(folder: Path, schedule: str) -> Calibrated:
    """Calibrate a small chain by `quantize_model`."""
    torch.manual_seed(SEED_OF_NETWORK)
    model = settle(Chain())
    torch.manual_seed(SEED_OF_DATA)
    data = [torch.randn(8, 3, 16, 16) for _ in range(4)]
    config = small_config(schedule, drop_probability=0.2)
    return quantize_model(model, data, config, checkpoint_dir=folder / "checkpoint", resume=True)


def bits_of(result: Calibrated) -> dict[str, Tensor]:
    """Return all that must not depend on interruptions: each tensor, and the record of each unit but its time."""
    told = [[unit.name, unit.stage, repr(unit.loss_before), repr(unit.loss_after), unit.kept] for unit in result.units]
    text = json.dumps([told, result.float_layers, result.layers])
    tensors = {key: value.detach().clone().contiguous() for key, value in result.model.state_dict().items()}
    return {**tensors, "record": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[key].shape == other[key].shape and torch.equal(one[key].nan_to_num(), other[key].nan_to_num())
        for key in one
    )


class Killable:
    """Starts calibrations of one entry, and kills them; a context manager.

    Args:
        entry: ``module:function`` of an `Entry`.
    """

    def __init__(self, entry: str) -> None:
        words = [sys.executable, "-m", __name__, entry]
        root = Path(__file__).resolve().parents[2]
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=root
        )

    def run(
        self, folder: Path, schedule: str, moment: float | None = None, write: int | None = None
    ) -> tuple[float, bool]:
        """Calibrate in a process of its own; the result goes to ``folder / "bits.safetensors"``.

        Args:
            folder: Everything goes there, temporary files too.
            schedule: See `RepAPQConfig`.
            moment: Seconds after the beginning at which it is killed.
            write: Which file of a part it is killed in the middle of, from 0 on.

        Returns:
            Seconds that it lived, and whether it came to its end.
        """
        assert self.server.stdin is not None
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        job = {"folder": str(folder), "schedule": schedule, "write": write}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        pid, started = int(self._line()), time.perf_counter()
        if moment is not None:
            time.sleep(moment)
            os.kill(pid, signal.SIGKILL)  # a child that has ended already is a zombie until the server is told
        self.server.stdin.write("wait\n")
        self.server.stdin.flush()
        status = int(self._line())
        assert status in (0, signal.SIGKILL), f"the calibration failed: status {status}"
        return time.perf_counter() - started, status == 0

    def _line(self) -> str:
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line, "the server has ended"
        return line

    def __enter__(self) -> Killable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait()


CONFIG_COPIES = "tmp*/tmp*.py"
"""What mmengine leaves in the temporary folder if it is killed while it reads a config."""


def leftovers(folder: Path) -> list[str]:
    """Return what a calibration left of temporary files, in its temporary folder and beside what it keeps."""
    found = [path for path in (folder / "tmp").rglob("*") if path.is_file() and not path.match(CONFIG_COPIES)]
    found += [path for pattern in checkpoints.PARTIALS for path in folder.rglob(pattern)]
    kept = (folder / "checkpoint").glob("*") if (folder / "checkpoint").exists() else []
    found += [path for path in kept if path.name not in STAYS and not path.match("part-*.safetensors")]
    return [str(path.relative_to(folder)) for path in found]


def ends_the_same(
    killable: Killable,
    schedule: str,
    whole: Path,
    killed: Path,
    moments: Sequence[float] = (),
    writes: Sequence[int] = (),
) -> int:
    """Kill a calibration again and again, let it end, and check that nobody can tell.

    Args:
        killable: Calibrates.
        schedule: See `RepAPQConfig`.
        whole: Folder of a calibration that nobody interrupted.
        killed: Folder of this one.
        moments: Seconds after its beginning at which each process is killed.
        writes: Files in whose middle each process after those is killed.

    Returns:
        How many processes were killed before their end.
    """
    ended = [killable.run(killed, schedule, moment=moment)[1] for moment in moments]
    ended += [killable.run(killed, schedule, write=write)[1] for write in writes]
    assert killable.run(killed, schedule)[1]
    assert same(bits_in(killed), bits_in(whole)), f"{schedule}: other bits after {moments} {writes}"
    assert leftovers(killed) == [], f"{schedule}: {leftovers(killed)} after {moments} {writes}"
    return ended.count(False)


def bits_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "bits.safetensors")


# -- in the processes ------------------------------------------------------------------------------------------------


def _killed_in_write(number: int) -> Callable[[dict[str, Tensor], Path, dict[str, str]], None]:
    """Return a ``save_file`` that writes half of the file of this number, as safetensors does, and is killed."""
    count = -1

    def save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        nonlocal count
        count += 1
        save_file(tensors, path, metadata)
        if count == number:
            data = path.read_bytes()
            for half in (path, path.with_name(".tmp012345")):
                half.write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    return save


def _calibrate(entry: Entry, folder: Path, schedule: str, write: int | None) -> None:
    os.environ["TMPDIR"], tempfile.tempdir = str(folder / "tmp"), None
    torch.set_num_threads(1)
    if schedule == "network":  # which has no parts: what is kept is the state after each step
        part_files.HALFWAY_SECONDS = 0.0
    if write is not None:
        part_files.save_file = _killed_in_write(write)  # type: ignore[assignment]
    save_file(bits_of(entry(folder, schedule)), folder / "bits.safetensors")


def serve(name: str) -> None:
    """Fork a process for each line of standard input, and tell its number and how it ended."""
    module, _, function = name.partition(":")
    entry = cast(Entry, getattr(importlib.import_module(module), function))
    importlib.import_module("torch._dynamo")  # optimizers load it, which takes seconds
    told = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what toolboxes print is no answer
    while line := sys.stdin.readline():
        job = json.loads(line)
        child = os.fork()
        if not child:
            status = 1
            try:
                _calibrate(entry, Path(job["folder"]), job["schedule"], job["write"])
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        told.write(f"{child}\n")
        sys.stdin.readline()
        told.write(f"{os.waitpid(child, 0)[1]}\n")


if __name__ == "__main__":
    serve(sys.argv[1])
