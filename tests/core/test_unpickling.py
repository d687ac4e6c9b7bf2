"""A file of other people is read, and nothing in it is run."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from repapq_plugin.core.unpickling import Refused, load_plain
from repapq_plugin.errors import HostError
from tests.support.hostile import Call, Restless

REMEDY = "Make a new one."


def test_tensors_and_plain_values_come_back(tmp_path: Path) -> None:
    content = {"a": torch.arange(3), "b": OrderedDict(c=[1, 2.5, None, True, "text", (b"bytes", {4})])}
    torch.save(content, tmp_path / "a.pth")
    read = load_plain(tmp_path / "a.pth", "It", REMEDY)
    assert isinstance(read, dict) and torch.equal(read.pop("a"), content.pop("a"))
    assert read == content


@pytest.mark.parametrize("zipped", [True, False])
def test_what_runs_is_refused_by_name_and_does_not_run(zipped: bool, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save([Restless(marker)], tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(HostError, match=r"^It holds tests\.support\.hostile\.Restless, which .* Make a new one\.$"):
        load_plain(tmp_path / "a.pth", "It", REMEDY)
    assert not marker.exists()
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert marker.exists()


def test_what_the_process_declared_safe_is_not_called_and_is_declared_again_afterwards(tmp_path: Path) -> None:
    torch.save(Restless(tmp_path / "marker"), tmp_path / "a.pth")
    with torch.serialization.safe_globals([Restless]):
        declared = set(torch.serialization.get_safe_globals())
        with pytest.raises(HostError, match="Restless"):
            load_plain(tmp_path / "a.pth", "It", REMEDY)
        assert Restless in declared
        assert set(torch.serialization.get_safe_globals()) == declared


def refuse(*_: object) -> object:
    raise Refused("this very thing")


def test_a_stand_in_takes_the_place_of_a_function_and_may_refuse(tmp_path: Path) -> None:
    torch.save(Call(exec, "1"), tmp_path / "a.pth")
    path = tmp_path / "a.pth"
    assert load_plain(path, "It", REMEDY, {"builtins.exec": lambda text: ("seen", text)}) == ("seen", "1")
    with pytest.raises(HostError, match="It holds this very thing, which"):
        load_plain(path, "It", REMEDY, {"builtins.exec": refuse})
    with pytest.raises(HostError, match="It cannot be read: TypeError"):
        load_plain(path, "It", REMEDY, {"builtins.exec": lambda: None})


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"\x80\x02junk",
        b"PK\x03\x04junk",
        b"\x80",
        b"not a pickle",
        pickle.dumps({"a": 1}, 4),
        b"\x80\x02(lp1\n0t.",
    ],
)
def test_a_damaged_file_is_an_error_of_one_line(damaged: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(damaged)
    with pytest.raises(HostError, match="^It cannot be read") as raised:
        load_plain(tmp_path / "a.pth", "It", REMEDY)
    assert "\n" not in str(raised.value) and "weights_only" not in str(raised.value)


def test_a_script_is_refused_with_the_remedy(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / "a.pth")
    with pytest.raises(HostError, match=r"^It cannot be read as plain data \(.*TorchScript.*Make a new one\.$"):
        load_plain(tmp_path / "a.pth", "It", REMEDY)


def test_a_file_that_is_not_there_is_said_as_python_says_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_plain(tmp_path / "nowhere.pth", "It", REMEDY)
