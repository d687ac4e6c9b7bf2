"""A result by itself is enough: `repapq eval` and `repapq export` read from the file what it was made from."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

from integration.openmmlab.scenes import CLASSIFIER, FEW_ITEMS, options
from repapq_plugin.cli import main
from repapq_plugin.export.origins import read_origin, write_origin

FILES = ("repapq.safetensors", "repapq.onnx", "repapq.xml")


@pytest.fixture(scope="module")
def folder(home: Path, classifier_checkpoint: Path) -> Iterator[Path]:
    """What the command makes of a classifier whose config is a copy that can be taken away."""
    made = home / "origin"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        words = ["quantize", str(CLASSIFIER), str(classifier_checkpoint), "-w", str(made), "-q", "steps=0"]
        words += ["-q", "reduce_range=True", "-q", "target=openvino", "--no-compare", *options(FEW_ITEMS)]
        assert main(words) == 0
    yield made


def _scores(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    capsys.readouterr()
    assert main(["eval", *words]) == 0
    return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)


@pytest.mark.parametrize("name", FILES)
def test_a_file_alone_is_scored_as_with_all_said_again(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = _scores(capsys, str(folder / name), "-w", str(tmp_path))
    assert alone["config"].startswith(str(CLASSIFIER))
    assert alone["target"].startswith("openvino; weights use 7 of 8 bits; quantized by RepAPQ")
    assert alone["checkpoint"] == "classifier.pth" and "mmpretrain" in alone["versions"]
    said = _scores(capsys, str(CLASSIFIER), str(folder / name), "-w", str(tmp_path), *options(FEW_ITEMS))
    assert alone["accuracy/top1"] == said["accuracy/top1"]


def test_a_file_that_says_nothing_needs_its_config_and_then_works(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(folder / "repapq.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "older.onnx")
    assert main(["eval", str(tmp_path / "older.onnx")]) == 1
    error = capsys.readouterr().err
    assert "older.onnx does not say how it was made; give its config: repapq eval CONFIG" in error
    with_config = [str(CLASSIFIER), str(tmp_path / "older.onnx"), "-w", str(tmp_path / "w"), *options(FEW_ITEMS)]
    scores = _scores(capsys, *with_config)
    wanted = _scores(capsys, str(folder / "repapq.onnx"), "-w", str(tmp_path / "w"))
    assert scores["accuracy/top1"] == wanted["accuracy/top1"]
    assert "config" not in scores


def test_a_config_that_is_gone_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(shutil.copy(folder / "repapq.onnx", tmp_path))
    origin = read_origin(path)
    assert origin is not None
    write_origin(path, dataclasses.replace(origin, config="/gone/net.py"))
    assert main(["eval", str(path)]) == 1
    assert "was made from the config /gone/net.py, which does not exist here; give it:" in capsys.readouterr().err
    write_origin(path, dataclasses.replace(origin, config=""))
    assert main(["eval", str(path)]) == 1
    assert "does not say which config it belongs to" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["custom_imports.imports=['os']", "model.type=os.system", "test_dataloader={'type': 'os.system'}"]
)
def test_a_file_brings_no_code_along(
    option: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copy(folder / "repapq.onnx", tmp_path))
    origin = read_origin(path)
    assert origin is not None
    write_origin(path, dataclasses.replace(origin, cfg_options=(option,)))
    assert main(["eval", str(path), "-w", str(tmp_path / "w")]) == 1
    error = capsys.readouterr().err
    assert "That is not taken from a file; give the option again" in error and not (tmp_path / "w").exists()


def test_what_is_exported_later_says_the_same(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "again.xml"
    words = ["export", str(folder / "repapq.safetensors"), "--format", "openvino", "-o", str(out), "-w", str(tmp_path)]
    assert main(words) == 0
    assert read_origin(out) == read_origin(folder / "repapq.xml") is not None


def test_the_float_network_says_its_config_and_no_bits(folder: Path) -> None:
    origin = read_origin(folder / "float.xml")
    assert origin is not None and origin.quantizer is None and origin.config == str(CLASSIFIER)
