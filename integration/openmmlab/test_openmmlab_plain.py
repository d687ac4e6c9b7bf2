"""What mmengine writes into checkpoints is read as plain data, from files of every form and from addresses."""

from __future__ import annotations

import functools
import pickle
from collections import defaultdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from safetensors.torch import save_file

from integration.openmmlab.lines import SCHEDULERS, LineModel, training
from repapq_plugin.core.unpickling import load_plain
from repapq_plugin.errors import HostError
from repapq_plugin.hosts.openmmlab.checkpoint import load_weights
from repapq_plugin.hosts.openmmlab.unpickling import STAND_INS
from tests.support.hostile import Call


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_all_that_mmengine_s_runner_saves_is_plain(scheduler: str, tmp_path: Path) -> None:
    training(tmp_path / f"training_{scheduler}", scheduler)
    saved = tmp_path / f"training_{scheduler}" / "epoch_1.pth"
    theirs = torch.load(saved, weights_only=False)
    assert {"meta", "state_dict", "message_hub", "optimizer", "param_schedulers", "ema_state_dict"} <= theirs.keys()
    model = LineModel()
    load_weights(model, str(saved))
    assert torch.equal(model.layer.weight, theirs["state_dict"]["layer.weight"])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_training_goes_on_from_what_was_read_as_if_never_stopped(scheduler: str, tmp_path: Path) -> None:
    whole = training(tmp_path / f"whole_{scheduler}", scheduler, epochs=3)
    first = tmp_path / f"whole_{scheduler}" / "epoch_1.pth"
    resumed = training(tmp_path / f"resumed_{scheduler}", scheduler, epochs=3, resumed_from=first)
    assert resumed.epoch == 3
    assert resumed.optim_wrapper.get_lr() == whole.optim_wrapper.get_lr()
    for one, other in zip(resumed.param_schedulers, whole.param_schedulers, strict=True):
        assert one.state_dict() == other.state_dict()
    logged, wanted = (runner.message_hub.get_scalar("train/loss") for runner in (resumed, whole))
    assert type(logged) is HistoryBuffer and type(logged.data[0]) is np.ndarray
    assert len(logged.data[0]) == len(wanted.data[0]) == 6
    assert np.array_equal(logged.data[0][:2], wanted.data[0][:2])
    assert logged.statistics("max") == logged.data[0].max()
    again = torch.load(tmp_path / f"resumed_{scheduler}" / "epoch_3.pth", weights_only=False)
    assert type(again["meta"]["dataset_meta"]["palette"]) is np.ndarray
    assert again["meta"]["dataset_meta"]["palette"].tolist() == [[0, 1, 2], [3, 4, 5]]


VALUES = {
    "big-endian": np.arange(3, dtype=">f4"),
    "by columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "complex": np.array([1j]),
    "empty": np.zeros((0, 3)),
    "no dimension": np.array(5),
    "text": np.array(["a", "bcd"]),
    "bytes": np.array([b"a", b""]),
    "truth": np.array([True, False]),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_numpy_s_plain_values_come_back(value: npt.NDArray[np.generic], tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(
        {"array": value, "numbers": list(value.flat), "type": value.dtype, "more": defaultdict(list, a=[1])}, path
    )
    read = load_plain(path, "It", "", STAND_INS)
    assert isinstance(read, dict) and isinstance(read["array"], np.ndarray)
    native = pickle.loads(pickle.dumps(value))  # NumPy turns the bytes of other machines around
    for got in (read, pickle.loads(pickle.dumps(read))):
        assert np.array_equal(got["array"], value) and got["array"].dtype == native.dtype
        assert got["array"].flags.f_contiguous == value.flags.f_contiguous
        assert got["numbers"] == list(value.flat) and [type(one) for one in got["numbers"]] == [*map(type, value.flat)]
        assert np.dtype(got["type"]) == value.dtype
        assert got["more"] == {"a": [1]}
    torch.save(read, path)
    assert type(torch.load(path, weights_only=False)["array"]) is np.ndarray


@pytest.mark.parametrize(
    "value",
    [
        np.array([None]),
        np.zeros(2, dtype=[("a", "f4")]),
        np.array("2020-01-01", dtype="datetime64"),
        Call(np.ndarray, (4,), "O"),
        Call(np._core.multiarray._reconstruct, np.memmap, (0,), b"b"),
        Call(np._core.multiarray.scalar, np.dtype("f4"), [1]),
        Call(np.dtype, [("a", "O")]),
        Call(getattr, HistoryBuffer, "__init__"),
        Call(getattr, OneCycleParamScheduler, "step"),
        functools.partial(print),
    ],
    ids=range(10),
)
def test_nothing_near_them_does(value: object, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "a.pth")
    with pytest.raises(HostError, match="^It holds .*, which is no plain data"):
        load_plain(tmp_path / "a.pth", "It", "", STAND_INS)


def test_every_form_of_a_file_and_an_address_is_read(tmp_path: Path, address: str) -> None:
    wanted = LineModel()
    torch.save({"state_dict": wanted.state_dict()}, tmp_path / "zip.pth")
    torch.save(wanted.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(wanted.state_dict(), tmp_path / "plain.safetensors")
    for name in ("zip.pth", "old.pth", "plain.safetensors"):
        for source in (str(tmp_path / name), address + name):
            for trusted in (False, True):
                model = LineModel()
                load_weights(model, source, trusted)
                assert torch.equal(model.layer.weight, wanted.layer.weight), source
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(HostError, match="bad.safetensors cannot be read: Error while deserializing header"):
        load_weights(LineModel(), str(tmp_path / "bad.safetensors"))
