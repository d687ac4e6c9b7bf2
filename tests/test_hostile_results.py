"""Whatever a file of a result holds: it loads as what was saved, or an error of ours says why not."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from repapq_plugin import CalibrationResult, RepAPQConfig, quantize_model
from repapq_plugin.errors import RepAPQError, ResultError
from tests.support.comparing import equal_numbers, numbers
from tests.support.networks import Tied, batches, settle

Saved = tuple[nn.Module, CalibrationResult, Path]

ODD: list[object] = [
    *(None, True, -1, 0, 3, 10**30, float("inf"), float("nan"), -0.5, "", "x", "../../etc/passwd", "a" * 1000),
    *([], {}, [[]], ["a"], {"a": 1}, [None], [1, 2], {"a": {"b": []}}, "head", "(a+)+$", "*" * 50),
]
"""What may stand in the place of any value."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    torch.manual_seed(0)
    model = settle(Tied())
    result = quantize_model(model, batches(1), RepAPQConfig.from_preset("w4a4", steps=1, target="tensorrt"))
    return model, result, result.save(tmp_path_factory.mktemp("saved") / "honest.safetensors")


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record."""
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["result"])


def written(path: Path, tensors: dict[str, Tensor], record: object) -> Path:
    """A file as an earlier version wrote it, which nothing seals."""
    save_file(tensors, path, metadata={"format": "repapq-result-2", "result": json.dumps(record)})
    return path


@settings(max_examples=80)
@given(data=st.data())
def test_a_file_of_which_bytes_changed_loads_equal_or_is_refused(saved: Saved, data: st.DataObject) -> None:
    model, result, honest = saved
    content = bytearray(honest.read_bytes())
    places = st.integers(0, len(content) - 1) | st.integers(0, 400)  # the head of a file is the smaller part of it
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    end = data.draw(st.none() | st.integers(0, len(content)))
    path = honest.with_name("changed.safetensors")
    path.write_bytes(content if end is None else content[:end])
    try:
        loaded = CalibrationResult.load(path, model)
    except ResultError:
        return
    assert loaded.summary() == result.summary()
    assert equal_numbers(weights(loaded), weights(result))


def weights(result: CalibrationResult) -> dict[str, Tensor]:
    return {key: value for key, value in numbers(result.model).items() if "activation_post_process" not in key}


def test_a_changed_number_is_told_from_what_was_written(saved: Saved) -> None:
    model, _, honest = saved
    content = honest.read_bytes()
    path = honest.with_name("changed.safetensors")
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ResultError, match="is damaged: .* is not what was written.* Quantize again"):
        CalibrationResult.load(path, model)
    path.write_bytes(content.replace(b'\\"seconds\\": ', b'\\"seconds\\":1', 1))
    with pytest.raises(ResultError, match="is not what was written"):
        CalibrationResult.load(path, model)


def places_in(value: object, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value in a record."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in members:
        yield (*before, key)
        yield from places_in(member, (*before, key))


@settings(max_examples=120)
@given(data=st.data())
def test_a_record_of_which_a_value_changed_loads_or_is_refused(saved: Saved, data: st.DataObject) -> None:
    model, _, honest = saved
    tensors, record = contents(honest)
    *way, last = data.draw(st.sampled_from(list(places_in(record))))
    changed = copy.deepcopy(record)
    owner = changed
    for key in way:
        owner = owner[key]
    how = data.draw(st.sampled_from(["odd", "odd", "gone", "named"]))
    if how == "odd":
        owner[last] = data.draw(st.sampled_from(ODD))
    else:
        value = owner.pop(last)
        if how == "named" and isinstance(owner, dict):
            owner[data.draw(st.sampled_from(["x", "", ".", "a.b", "head", "__class__", "weight"]))] = value
    try:
        CalibrationResult.load(written(honest.with_name("changed.safetensors"), tensors, changed), model)
    except RepAPQError:
        return


LIES = {
    "a scale that is no number": ("log_scale", lambda x: x * float("nan"), "log_scale holds what is no number"),
    "an endless scale": ("log_scale", lambda x: x + float("inf"), "log_scale holds what is no number"),
    "a zero point beyond the grid": ("zero_point", lambda x: x + 10**6, "zero_point is not from"),
    "a scale too many": ("log_scale", lambda x: torch.cat([x, x]), "shape"),
    "a scale of two axes": ("log_scale", lambda x: x[None], "shape"),
    "no scale": ("log_scale", lambda x: x[:0], "shape"),
    "a weight of another shape": (".weight", lambda x: x[:1], "size mismatch"),
    "a weight of no size": (".weight", lambda x: x.new_zeros(()), "size mismatch"),
}


@pytest.mark.parametrize("name", LIES)
def test_tensors_that_cannot_be_are_refused_by_name(saved: Saved, name: str) -> None:
    model, _, honest = saved
    part, change, message = LIES[name]
    tensors, record = contents(honest)
    for key in [key for key in tensors if key.endswith(part)]:
        changed = {**tensors, key: change(tensors[key]).contiguous()}
        with pytest.raises(ResultError, match=message):
            CalibrationResult.load(written(honest.with_name("lies.safetensors"), changed, record), model)


def test_a_folder_and_a_file_of_something_else_are_refused(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="Cannot read"):
        CalibrationResult.load(tmp_path, saved[0])
    for content in (b"", b"\xff" * 8, (2**62).to_bytes(8, "little") + b"{}", b"\x02" + bytes(7) + b"{}"):
        (tmp_path / "a.safetensors").write_bytes(content)
        with pytest.raises(ResultError):
            CalibrationResult.load(tmp_path / "a.safetensors", saved[0])
