"""Files appear whole or not at all."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

from repapq_plugin.core.files import OWNED, ScratchFolder, atomically, remove_orphans, write_atomically
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


# -- scratch folders ---------------------------------------------------------------------------------------------------


def test_a_scratch_folder_is_there_until_it_is_removed(tmp_path: Path) -> None:
    one, other = ScratchFolder("x-", str(tmp_path)), ScratchFolder("x-", str(tmp_path))
    (one.path / "file").write_text("a")
    remove_orphans("x-", str(tmp_path))
    assert sorted(tmp_path.iterdir()) == sorted([one.path, other.path]) and (one.path / "file").exists()
    one.remove()
    assert list(tmp_path.iterdir()) == [other.path]
    other.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_killed_process_goes_and_all_others_stay(tmp_path: Path) -> None:
    code = (
        "import os, sys; from repapq_plugin.core.files import ScratchFolder\n"
        "folder = ScratchFolder('x-', sys.argv[1]); (folder.path / 'file').write_text('a')\n"
        "print(folder.path, flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    for name in ("x-unlocked", "y-other"):  # not ours, or made by a process that has not come to lock it yet
        (tmp_path / name).mkdir()
    (tmp_path / "y-other" / OWNED).touch()
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        remove_orphans("x-", str(tmp_path))
        assert (path / "file").exists()
        process.kill()
        process.wait()
    assert (path / "file").exists()
    remove_orphans("x-", str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-unlocked", "y-other"]


def test_a_folder_that_another_process_takes_away_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thieves = []
    made = tempfile.mkdtemp

    def stolen(**keys: str) -> str:
        folder = made(**keys)
        if not thieves:
            thieves.append(FileLock(Path(folder) / OWNED, timeout=0))
            thieves[0].acquire()
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", stolen)
    folder = ScratchFolder("x-", str(tmp_path))
    assert not (Path(thieves[0].lock_file).parent == folder.path)
    thieves[0].release()
