"""Writing files so that nobody ever finds half of one."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from repapq_plugin.errors import ExportError


def unwritable(path: Path, error: Exception) -> ExportError:
    """Return the error that says why ``path`` cannot be written and what to do."""
    return ExportError(
        f"Cannot write {path}: {error}. Nothing was left half written; choose a folder that can be made, "
        "is writable and has room."
    )


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, replacing what is there only once all of it lies on the disk.

    Raises:
        ExportError: The folder cannot be made or written, or the disk is full; what stood at
            ``path`` before still does.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
