"""Quantize with a peer, say what that took, then run arrays through the result: ``python serve.py NAME JOB``.

Runs in an environment of the peer, which lacks this package. ``NAME`` is a module beside this file with

    quantize(job, batches, folder) -> (run, facts)

where ``job`` is what ``JOB`` (a JSON file) says, ``batches`` are float32 arrays, ``run`` takes a float32 array and
returns the network's outputs, and ``facts`` are strings by name: ``file`` for a network that a runtime reads, and
``note``. Messages go over the standard output as eight bytes of length and that many bytes: JSON at first, then for
each archive of one array that comes in an archive of all outputs.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import struct
import sys
import time
import traceback
from pathlib import Path
from typing import BinaryIO

import numpy as np

LENGTH = struct.Struct("<Q")
LIMIT = 400
"""Characters of an error that are told."""


def peak_memory() -> int | None:
    """Return the largest resident memory of this process in bytes, if the system says it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def send(pipe: BinaryIO, content: bytes) -> None:
    """Write one message."""
    pipe.write(LENGTH.pack(len(content)) + content)
    pipe.flush()


def receive(pipe: BinaryIO) -> bytes | None:
    """Read one message; ``None`` at the end."""
    head = pipe.read(LENGTH.size)
    return pipe.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else None


def main(name: str, path: Path) -> int:
    """Quantize, then serve until the input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the messages
    job = json.loads(path.read_text())
    with np.load(job["calibration"], allow_pickle=False) as archive:
        batches = [archive[key] for key in archive.files]
    started = time.process_time()
    try:
        run, facts = importlib.import_module(name).quantize(job, batches, path.parent)
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        send(answers, json.dumps({"error": f"{type(error).__name__}: {error}"[:LIMIT]}).encode())
        return 0
    took = {"cpu_seconds": time.process_time() - started, "peak_bytes": peak_memory(), **facts}
    send(answers, json.dumps(took).encode())
    while (content := receive(sys.stdin.buffer)) is not None:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            outputs = run(archive[archive.files[0]])
        packed = io.BytesIO()
        np.savez(packed, *(np.asarray(output) for output in outputs))
        send(answers, packed.getvalue())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
