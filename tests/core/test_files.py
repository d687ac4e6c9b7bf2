"""Files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from repapq_plugin.core.files import atomically, write_atomically
from repapq_plugin.errors import ExportError


def test_a_file_replaces_the_old_one_at_the_end_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, b"old")
    with atomically(path) as partial:
        assert partial.parent == path.parent and not partial.exists()
        partial.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), atomically(path) as partial:
        partial.write_bytes(b"half of the n")
        raise KeyError
    with pytest.raises(FileNotFoundError), atomically(path):
        pass  # nothing was written
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError), atomically(tmp_path / "file" / "below"):
        pass
    with pytest.raises(ExportError, match=r"Cannot write .*file/below: .*Nothing was left half written"):
        write_atomically(tmp_path / "file" / "below", b"")
