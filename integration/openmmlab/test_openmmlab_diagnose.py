"""``repapq diagnose``, from a config to a page, and from a file to the layer that differs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from integration.openmmlab.scenes import CLASSIFIER, FEW_ITEMS, IMAGES, options
from repapq_plugin.cli import main
from tests.support.markup import Markup


def diagnose(config: Path, folder: Path, *more: str) -> int:
    return main(["diagnose", str(config), *more, "-w", str(folder), *options(FEW_ITEMS)])


def test_a_model_is_diagnosed_on_its_calibration_images(
    classifier_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few_bits = ("-q", "layer_bits={'backbone.stage_2.1*': (2, 2)}")
    words = (str(classifier_checkpoint), "--preset", "w8a8", "-q", "steps=0", "--calib-samples", str(IMAGES), *few_bits)
    assert diagnose(CLASSIFIER, tmp_path / "work", *words) == 0
    shown = capsys.readouterr().out
    assert f"on {IMAGES} samples" in shown
    said = json.loads((tmp_path / "work" / "diagnosis.json").read_text())
    assert (said["samples"], said["scheme"][:4]) == (IMAGES, "W8A8")
    weakest = min(said["units"], key=lambda unit: unit["snr"])
    assert weakest["name"].startswith("backbone.stage_2.1") and weakest["bits"] == [2, 2]
    assert {remedy["name"] for remedy in weakest["remedies"]} & {"bits", "keep_float"}
    unit = said["units"][1]
    assert list(unit["moments"]) == ["branched", "merged", "conditioned", "calibrated"]
    assert unit["moments"]["branched"]["weights"]["kurtosis"] > 0
    page = Markup((tmp_path / "work" / "diagnosis.html").read_text())
    assert all(unit["name"] in page.text for unit in said["units"])
    assert not (tmp_path / "work" / "checkpoint").exists()


def test_a_planted_weight_is_found_in_a_file(
    classifier_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    words = ["quantize", str(CLASSIFIER), str(classifier_checkpoint), "-w", str(work), "-q", "steps=0", "--no-report"]
    assert main([*words, "--no-compare", "--export", "onnx", *options(FEW_ITEMS)]) == 0
    assert not (work / "report.html").exists()
    assert diagnose(CLASSIFIER, tmp_path / "right", "--file", str(work / "repapq.onnx")) == 0
    assert "No layer of repapq.onnx computes anything else" in capsys.readouterr().out
    graph = onnx.load(work / "repapq.onnx")
    codes = [each for each in graph.graph.initializer if each.name.endswith(".weight_codes")][4]
    values = numpy_helper.to_array(codes).copy()
    values[0] = -values[0] + np.int8(1)
    codes.CopyFrom(numpy_helper.from_array(values, codes.name))
    onnx.save(graph, work / "wrong.onnx")
    assert diagnose(CLASSIFIER, tmp_path / "wrong", "--file", str(work / "wrong.onnx")) == 0
    layer = codes.name.removesuffix(".weight_codes")
    assert f"{layer} is the first layer of wrong.onnx that computes something else" in capsys.readouterr().out
    page = Markup((tmp_path / "wrong" / "diagnosis.html").read_text())
    assert page.text.count("differs here") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--file", "net.xml"), "--file 'net.xml' is not allowed; give an .onnx file"),
        (("--file", "nowhere.onnx"), "does not exist"),
        (("--result", "a.safetensors"), "is not allowed without --file"),
        (("-q", "type=NNCF"), "quantizer.type='NNCF' is not diagnosed"),
    ],
)
def test_wrong_input_ends_in_a_line(
    more: tuple[str, ...],
    message: str,
    classifier_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert diagnose(CLASSIFIER, tmp_path / "work", str(classifier_checkpoint), *more) == 1
    assert message in capsys.readouterr().err
