"""Finished parts are brought back in order; a folder that is not ours, or of another work, is refused."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from repapq_plugin.core.checkpoints import LOCK, MANIFEST, CheckpointFolder, Checkpoints
from repapq_plugin.core.fingerprints import Fingerprint
from repapq_plugin.core.part_files import Record
from repapq_plugin.core.ranked_checkpoints import checkpoints_in
from repapq_plugin.errors import CheckpointError, ConfigError
from tests.support.disk import largest_file

WORK: Fingerprint = {"config": {"steps": "3"}}
PARTS = ("first", "second", "third")


class Worker:
    """Draws a number at random for each part, and writes down what it really did."""

    def __init__(self, fails: str = "") -> None:
        self.tensor, self.did, self.fails = torch.zeros(3), list[str](), fails

    def part(self, checkpoints: Checkpoints, name: str) -> Record:
        def work() -> Record:
            if name == self.fails:
                raise RuntimeError(name)
            self.did.append(name)
            self.tensor = self.tensor * 2 + torch.rand(3)
            return {"name": name, "sum": float(self.tensor.sum()), "nothing": float("nan")}

        def load(saved: Mapping[str, Tensor]) -> None:
            self.tensor = saved["tensor"].clone()

        return checkpoints.once(name, work, lambda: {"tensor": self.tensor}, load)

    def run(self, checkpoints: Checkpoints, parts: tuple[str, ...] = PARTS, work: Fingerprint = WORK) -> list[Record]:
        torch.manual_seed(1)
        with checkpoints.opened(lambda: work):
            return [self.part(checkpoints, name) for name in parts]


def same(found: list[Record], wanted: list[Record]) -> bool:
    return [{**record, "nothing": 0} for record in found] == [{**record, "nothing": 0} for record in wanted]


@pytest.fixture
def wanted() -> list[Record]:
    return Worker().run(Checkpoints())


@pytest.mark.parametrize("done", range(4))
def test_what_is_done_is_brought_back_and_the_rest_is_as_if_nothing_had_stopped_it(
    tmp_path: Path, wanted: list[Record], done: int
) -> None:
    Worker().run(CheckpointFolder(tmp_path / "a" / "b"), PARTS[:done])
    worker, folder = Worker(), CheckpointFolder(tmp_path / "a" / "b", resume=True)
    found = worker.run(folder)
    assert worker.did == list(PARTS[done:])
    assert same(found, wanted)
    assert folder.finished == PARTS and folder.notes == []


def test_behind_a_part_that_is_missing_everything_is_done_again(tmp_path: Path, wanted: list[Record]) -> None:
    Worker().run(CheckpointFolder(tmp_path))
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    worker = Worker()
    assert same(worker.run(CheckpointFolder(tmp_path, resume=True)), wanted)
    assert worker.did == ["second", "third"]


def test_a_part_that_fails_fails_again_and_the_others_are_kept(tmp_path: Path) -> None:
    found = []
    for resume in (False, True):
        worker, folder = Worker(fails="second"), CheckpointFolder(tmp_path, resume)
        torch.manual_seed(1)
        with folder.opened(lambda: WORK):
            records = [worker.part(folder, "first")]
            with pytest.raises(RuntimeError, match="second"):
                worker.part(folder, "second")
            found.append([*records, worker.part(folder, "third")])
        assert worker.did == ([] if resume else ["first", "third"])
    assert same(*found)


def test_a_new_part_in_front_makes_those_behind_it_worthless(tmp_path: Path) -> None:
    Worker().run(CheckpointFolder(tmp_path))
    worker = Worker()
    worker.run(CheckpointFolder(tmp_path, resume=True), ("first", "new", "third"))
    assert worker.did == ["new", "third"]
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_finished_parts_are_not_overwritten_unless_somebody_says_so(tmp_path: Path) -> None:
    Worker().run(CheckpointFolder(tmp_path))
    with pytest.raises(CheckpointError, match=r"finished parts .*resume=True.*To start anew, delete"):
        CheckpointFolder(tmp_path)
    before = CheckpointFolder(tmp_path / "other")
    Worker().run(CheckpointFolder(tmp_path / "other"))
    with pytest.raises(CheckpointError, match="resume=True"):
        Worker().run(before)


def test_another_work_is_refused_with_what_differs_and_what_to_do(tmp_path: Path, wanted: list[Record]) -> None:
    Worker().run(CheckpointFolder(tmp_path), PARTS[:1])
    with pytest.raises(CheckpointError, match=r"config\.steps was 3 and is 4\. .*delete .* or choose another"):
        Worker().run(CheckpointFolder(tmp_path, resume=True), work={"config": {"steps": "4"}})
    worker = Worker()
    assert same(worker.run(CheckpointFolder(tmp_path, resume=True)), wanted), "and nothing was lost by it"
    assert worker.did == ["second", "third"]


def test_a_folder_without_a_finished_part_takes_any_work(tmp_path: Path) -> None:
    Worker().run(CheckpointFolder(tmp_path), ())
    Worker().run(CheckpointFolder(tmp_path), (), {"config": {"steps": "4"}})
    Worker().run(CheckpointFolder(tmp_path, resume=True))


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path, wanted: list[Record]) -> None:
    (tmp_path / f".{MANIFEST}.0123.part").write_text("{")
    Worker().run(CheckpointFolder(tmp_path), PARTS[:1])
    for name in (".part-00001.safetensors.4567.part", ".tmpAb3dE6"):  # ours, and safetensors' own within it
        (tmp_path / name).write_text("half")
    assert same(Worker().run(CheckpointFolder(tmp_path, resume=True)), wanted)
    assert {path.name for path in tmp_path.iterdir()} == {
        MANIFEST, LOCK, "part-00000.safetensors", "part-00001.safetensors", "part-00002.safetensors"
    }  # fmt: skip


def test_removing_leaves_nothing_but_what_is_not_ours(tmp_path: Path) -> None:
    for name in ("alone", "shared"):
        folder = CheckpointFolder(tmp_path / name)
        Worker().run(folder)
        if name == "shared":
            (tmp_path / name / "notes.txt").write_text("mine")
        folder.remove()
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "shared",
        "shared/notes.txt",
    ]


# -- folders that cannot be used -------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("photo.jpg", "", "holds other files than a checkpoint's .photo.jpg.; choose an empty folder"),
        (MANIFEST, "not json", "cannot be read as a checkpoint's"),
        (MANIFEST, '{"format": "other", "version": 1, "work": {}}', "is not a checkpoint's"),
        (MANIFEST, '{"format": "repapq-checkpoint", "version": "1", "work": {}}', "is not a checkpoint's"),
        (MANIFEST, '{"format": "repapq-checkpoint", "version": 1}', "is not a checkpoint's"),
        (MANIFEST, "[]", "cannot be read as a checkpoint's"),
        (MANIFEST, '{"format": "repapq-checkpoint", "version": 2, "work": 1}', "is not a checkpoint's"),
        (MANIFEST, '{"format": "repapq-checkpoint", "version": 2, "work": {}}', "newer version .form 2.*reads 1"),
    ],
)
def test_a_folder_that_is_not_ours_or_newer_is_refused(
    tmp_path: Path, name: str, text: str, message: str, resume: bool
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        CheckpointFolder(tmp_path, resume)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == text


def test_a_file_or_a_place_that_takes_none_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file; choose a folder"):
        CheckpointFolder(tmp_path / "file")
    for path in (tmp_path / "file" / "below", Path("/proc/repapq")):
        with pytest.raises(CheckpointError, match="cannot be written: .*choose another folder"):
            CheckpointFolder(path)


@pytest.fixture
def nobody() -> Iterator[None]:
    """Be a user for whom the rights of a folder count."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("rights", [0o555, 0o000], ids=["read-only", "closed"])
@pytest.mark.parametrize("name", ["", "below"])
def test_a_folder_that_is_read_only_is_refused(rights: int, name: str, nobody: None) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(rights)
        with pytest.raises(CheckpointError, match="cannot be written: .*choose another folder"):
            CheckpointFolder(folder / name)
    finally:
        folder.chmod(0o755)
        folder.rmdir()


def test_a_disk_that_is_full_at_once_is_refused(tmp_path: Path) -> None:
    with largest_file(0), pytest.raises(CheckpointError, match="cannot be written: .*Free some space"):
        Worker().run(CheckpointFolder(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    Worker().run(CheckpointFolder(tmp_path))


def test_a_disk_that_fills_up_stops_the_keeping_and_not_the_work(
    tmp_path: Path, wanted: list[Record], caplog: pytest.LogCaptureFixture
) -> None:
    folder, worker = CheckpointFolder(tmp_path), Worker()
    torch.manual_seed(1)
    with folder.opened(lambda: WORK), caplog.at_level(logging.WARNING, "repapq_plugin"):
        found = [worker.part(folder, "first")]
        with largest_file(100):
            found += [worker.part(folder, "second")]
        found += [worker.part(folder, "third")]
    assert same(found, wanted)
    assert folder.finished == ("first",)
    assert "From 'second' on nothing was kept" in folder.notes[0] and folder.notes[0] in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {MANIFEST, LOCK, "part-00000.safetensors"}
    worker = Worker()
    assert same(worker.run(CheckpointFolder(tmp_path, resume=True)), wanted)
    assert worker.did == ["second", "third"]


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "another", "deep"])
def test_a_part_that_is_damaged_is_named_with_what_to_do(tmp_path: Path, wanted: list[Record], damage: str) -> None:
    Worker().run(CheckpointFolder(tmp_path))
    path = tmp_path / "part-00001.safetensors"
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-1], "empty": b"", "text": b"x" * 100}.get(damage, data))
    if damage == "another":  # a sound file that does not say what it is
        save_file({"tensor": torch.ones(3)}, path)
    if damage == "deep":
        save_file({"tensor": torch.ones(3)}, path, metadata={"name": "second", "record": "[" * 100_000})
    with pytest.raises(CheckpointError, match=r"part-00001\.safetensors is damaged .*; delete it"):
        Worker().run(CheckpointFolder(tmp_path, resume=True))
    path.unlink()
    assert same(Worker().run(CheckpointFolder(tmp_path, resume=True)), wanted)


def test_a_second_work_in_a_folder_is_refused_and_a_lock_without_owner_is_not_minded(
    tmp_path: Path, wanted: list[Record]
) -> None:
    first, second = CheckpointFolder(tmp_path), CheckpointFolder(tmp_path)
    with first.opened(lambda: WORK), pytest.raises(CheckpointError, match="Another process works in"):
        Worker().run(second)
    assert (tmp_path / LOCK).exists()
    code = (
        "import os, sys; from repapq_plugin.core.checkpoints import CheckpointFolder\n"
        "folder = CheckpointFolder(sys.argv[1]).opened(lambda: {})\n"
        "folder.__enter__(); print('locked', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(CheckpointError, match="Another process works in"):
            Worker().run(CheckpointFolder(tmp_path))
        other.kill()
    assert same(Worker().run(CheckpointFolder(tmp_path)), wanted)


def test_after_an_interruption_the_log_says_how_to_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, worker = CheckpointFolder(tmp_path), Worker()
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt), folder.opened(lambda: WORK):
        worker.part(folder, "first")
        raise KeyboardInterrupt
    assert f"Interrupted. Finished parts in {tmp_path}: 1. The same call with resume=True goes on." in caplog.text
    assert same(worker.run(CheckpointFolder(tmp_path, resume=True)), Worker().run(Checkpoints()))


@pytest.mark.parametrize(
    ("folder", "resume", "message"),
    [
        (None, True, "resume=True is not allowed without checkpoint_dir"),
        ("x", "yes", "resume='yes' is not allowed; choose True or False"),
        (3, False, "checkpoint_dir=3 is not allowed"),
        ("", False, "checkpoint_dir='' is not allowed"),
    ],
)
def test_values_that_make_no_sense_are_refused(folder: object, resume: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checkpoints_in(folder, resume)  # type: ignore[arg-type]


def test_what_stands_in_the_folder_is_plain(tmp_path: Path) -> None:
    Worker().run(checkpoints_in(str(tmp_path)))
    said = json.loads((tmp_path / MANIFEST).read_text())
    assert said == {"format": "repapq-checkpoint", "version": 1, "work": WORK}
    assert all(path.read_bytes()[8:9] == b"{" for path in tmp_path.glob("part-*"))
