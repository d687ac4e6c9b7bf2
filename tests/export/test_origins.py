"""Files of every kind take and give back how they were made, and are otherwise the same."""

from __future__ import annotations

import zipfile
from pathlib import Path

import onnx
import openvino
import pytest
import torch
from torch import Tensor

from repapq_plugin import CalibrationResult, RepAPQConfig, export_onnx, export_openvino, quantize_model
from repapq_plugin.core.origin import KEY, Decoding, Origin
from repapq_plugin.errors import ResultError
from repapq_plugin.evaluation import OnnxRuntimeNetwork, OpenVINONetwork
from repapq_plugin.export.origins import read_origin, write_origin
from tests.support.networks import Chain, batches, settle

ORIGIN = Origin(
    RepAPQConfig.from_preset("w6a6", reduce_range=True),
    "RepAPQ",
    '/a folder/"net" <1>.py',
    ("data.root=[1, 2]",),
    "weights.pth",
    {"torch": "2.0"},
    Decoding(None, True),
)
KINDS = (".onnx", ".xml", ".safetensors", ".pth")


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    torch.manual_seed(0)
    return batches(2)


@pytest.fixture(scope="module")
def network() -> Chain:
    torch.manual_seed(0)
    return settle(Chain())


@pytest.fixture(scope="module")
def result(network: Chain, data: list[Tensor]) -> CalibrationResult:
    return quantize_model(network, data, RepAPQConfig(steps=0, reduce_range=True, target="openvino"))


@pytest.fixture
def files(result: CalibrationResult, data: list[Tensor], tmp_path: Path) -> dict[str, Path]:
    made = {kind: tmp_path / f"net{kind}" for kind in KINDS}
    export_onnx(result, data[0], made[".onnx"])
    export_openvino(result, data[0], made[".xml"])
    result.save(made[".safetensors"])
    torch.save({"a": torch.arange(5)}, made[".pth"])
    return made


def test_exported_files_know_their_quantizer_and_versions(files: dict[str, Path]) -> None:
    for kind in (".onnx", ".xml"):
        made = read_origin(files[kind])
        assert made is not None and made.quantizer is not None
        assert made.quantizer.target == "openvino" and made.reduce_range and made.versions["torch"]
        assert made.config == "" and made.decoding is None
    assert read_origin(files[".safetensors"]) is None and read_origin(files[".pth"]) is None


@pytest.mark.parametrize("kind", KINDS)
def test_an_origin_is_written_into_every_kind_and_read_back(kind: str, files: dict[str, Path]) -> None:
    write_origin(files[kind], ORIGIN)
    assert read_origin(files[kind]) == ORIGIN
    assert sorted(path.name for path in files[kind].parent.iterdir() if path.name.startswith(".")) == []


def test_the_files_compute_what_they_did(
    files: dict[str, Path], result: CalibrationResult, network: Chain, data: list[Tensor]
) -> None:
    before = [OnnxRuntimeNetwork(files[".onnx"])(data[0]), OpenVINONetwork(files[".xml"])(data[0])]
    for path in files.values():
        write_origin(path, ORIGIN)
    after = [OnnxRuntimeNetwork(files[".onnx"])(data[0]), OpenVINONetwork(files[".xml"])(data[0])]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    loaded = CalibrationResult.load(files[".safetensors"], network)
    assert torch.equal(loaded.model(data[0]), result.model(data[0]))
    assert torch.load(files[".pth"], weights_only=True)["a"].tolist() == [0, 1, 2, 3, 4]
    assert zipfile.ZipFile(files[".pth"]).testzip() is None


def test_others_find_it_where_they_look(files: dict[str, Path]) -> None:
    write_origin(files[".onnx"], ORIGIN)
    write_origin(files[".onnx"], ORIGIN)  # replaced, not doubled
    properties = [entry for entry in onnx.load(files[".onnx"]).metadata_props if entry.key == KEY]
    assert [entry.value for entry in properties] == [ORIGIN.to_text()]
    write_origin(files[".xml"], ORIGIN)
    assert openvino.Core().read_model(files[".xml"]).get_rt_info([KEY]).astype(str) == ORIGIN.to_text()


def test_a_converted_file_keeps_it(files: dict[str, Path], data: list[Tensor], tmp_path: Path) -> None:
    write_origin(files[".onnx"], ORIGIN)
    export_openvino(files[".onnx"], data[0], tmp_path / "converted.xml")
    assert read_origin(tmp_path / "converted.xml") == ORIGIN


def test_files_of_others_say_nothing(files: dict[str, Path]) -> None:
    model = onnx.load(files[".onnx"])
    del model.metadata_props[:]
    onnx.save(model, files[".onnx"])
    assert read_origin(files[".onnx"]) is None


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_and_missing_files_are_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"broken{kind}"
    with pytest.raises(ResultError, match="There is no file"):
        read_origin(path)
    path.write_bytes(b"\xff\xff not such a file")
    with pytest.raises(ResultError, match=f"broken{kind} cannot be read"):
        read_origin(path)
    with pytest.raises(ResultError, match=r"net\.txt is not a file that says"):
        read_origin(tmp_path / "net.txt")
