"""Writing files so that nobody finds half of one, and temporary ones that do not outlive their process for long."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from repapq_plugin.errors import ExportError


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Let the block write a temporary file beside ``path``, and put it in the place of ``path`` at the end.

    The folder is made where it is missing. The file replaces what is there only once all of it lies on
    the disk. If the block or a later step fails, the temporary file goes, and what stood at ``path`` stays.

    Args:
        path: The file to write.

    Yields:
        The temporary file's path; nothing exists there yet, and the block must write it.

    Raises:
        OSError: The folder cannot be made or written, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield partial
        with partial.open("rb+") as file:  # a crash of the machine must not leave a name without its content
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def unwritable(path: Path, error: Exception) -> ExportError:
    """Return the error that says why ``path`` cannot be written and what to do."""
    return ExportError(
        f"Cannot write {path}: {error}. Nothing was left half written; choose a folder that can be made, "
        "is writable and has room."
    )


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` (see `atomically`).

    Raises:
        ExportError: The folder cannot be made or written, or the disk is full; what stood at
            ``path`` before still does.
    """
    try:
        with atomically(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise unwritable(path, error) from error


OWNED = "owner.lock"
"""File in a `ScratchFolder` that its process keeps locked; the system frees it whatever ends the process."""


class ScratchFolder:
    """A temporary folder that its process owns until `remove`; see `remove_orphans` for those of killed processes.

    Args:
        prefix: What its name begins with.
        parent: Where it is made; ``None``: where the system has temporary files.

    Raises:
        OSError: It cannot be made.
    """

    def __init__(self, prefix: str, parent: str | None = None) -> None:
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            self._lock = FileLock(self.path / OWNED, timeout=0)
            try:
                self._lock.acquire()
            except (Timeout, FileNotFoundError):  # another process took it for an orphan just now, and removes it
                continue
            if (self.path / OWNED).exists():
                return
            self._lock.release()

    def remove(self) -> None:
        """Delete the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()


def remove_orphans(prefix: str, parent: str | None = None) -> None:
    """Delete each `ScratchFolder` whose process has ended without `remove`; what cannot be deleted stays."""
    for folder in Path(parent or tempfile.gettempdir()).glob(f"{prefix}*"):
        if not (folder / OWNED).exists():  # being made right now, or somebody else's
            continue
        try:
            with FileLock(folder / OWNED, timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
        except (Timeout, OSError):
            continue


def digest_of(record: str, tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of what a file says, by which a damaged one is told.

    Args:
        record: Its text.
        tensors: Its tensors by name, in one piece each and on the processor.
    """
    found = hashlib.sha256(record.encode())
    for key, tensor in sorted(tensors.items()):
        found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
