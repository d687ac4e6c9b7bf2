"""A network that a peer computes, in a process and an environment of its own."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import torch
from torch import Tensor, nn

from repapq_plugin.errors import HostError

PROGRAMS = Path(__file__).with_name("programs")
LENGTH = struct.Struct("<Q")

LOG, JOB = "peer.log", "job.json"
"""Files in a row's folder: what the peer printed; what it was told."""

TOLD = 600
"""How many of the last characters of the log an error quotes."""


class ServedNetwork(nn.Module):
    """Runs a peer's program, which quantizes; then each call goes there and comes back.

    Args:
        python: Interpreter of the peer's environment.
        program: Module in ``programs/`` that quantizes.
        job: What it is told.
        folder: Takes the job, the log and the peer's files.

    Raises:
        HostError: The peer failed; the message quotes it.
    """

    def __init__(self, python: Path, program: str, job: Mapping[str, object], folder: Path) -> None:
        super().__init__()
        (folder / JOB).write_text(json.dumps(job))
        self._log = (folder / LOG).open("wb")
        self._folder = folder
        # Nothing of this process's own packages: an environment is what was installed into it.
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        environment["PYTHONNOUSERSITE"] = "1"
        command = [str(python), str(PROGRAMS / "serve.py"), program, str(folder / JOB)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment
        )
        try:
            self.facts: dict[str, object] = json.loads(self._read())
            if "error" in self.facts:
                raise HostError(str(self.facts["error"]))
        except BaseException:
            self.close()
            raise

    @property
    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        process = self._process
        if process.stdin is None or process.stdout is None:
            raise HostError("The peer's process has no pipes; start it anew.")
        return process.stdin, process.stdout

    def _read(self) -> bytes:
        head = self._pipes[1].read(LENGTH.size)
        content = self._pipes[1].read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""
        if not content:
            self._log.flush()
            said = (self._folder / LOG).read_bytes()[-TOLD:].decode(errors="replace").strip()
            raise HostError(f"The peer's process ended with code {self._process.wait()}: {said}")
        return content

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the outputs for ``x``, float ``(N, ...)``; a single one without a tuple.

        Raises:
            HostError: The peer's process ended.
        """
        packed = io.BytesIO()
        np.savez(packed, x.detach().cpu().float().contiguous().numpy())
        content = packed.getvalue()
        try:
            self._pipes[0].write(LENGTH.pack(len(content)) + content)
            self._pipes[0].flush()
        except OSError:
            pass  # reading says why
        with np.load(io.BytesIO(self._read()), allow_pickle=False) as archive:
            outputs = tuple(torch.from_numpy(archive[key]).to(x.device) for key in archive.files)
        return outputs[0] if len(outputs) == 1 else outputs

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> ServedNetwork:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
