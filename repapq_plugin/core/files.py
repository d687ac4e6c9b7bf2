"""Writing files so that nobody ever finds half of one."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
