"""The page of a diagnosis names what was planted, and says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from repapq_plugin import RepAPQConfig
from repapq_plugin.diagnosis import Diagnosis, diagnose
from repapq_plugin.diagnosis.differences import LayerDifference
from repapq_plugin.report import difference_section, write_diagnosis
from tests.support.markup import Markup
from tests.support.networks import Chain, batches, settle

SAMPLE = 3


@pytest.fixture(scope="module")
def found() -> Diagnosis:
    torch.manual_seed(0)
    data = batches()
    data[0][SAMPLE, 1] *= 50
    return diagnose(settle(Chain()), data, RepAPQConfig(weight_bits=3, activation_bits=3, steps=0))


def test_units_channels_samples_and_remedies_are_told(found: Diagnosis, tmp_path: Path) -> None:
    names = [f"image_{index}.png" for index in range(found.samples)]
    page = Markup(write_diagnosis(found, tmp_path / "diagnosis.html", title="net", samples=names).read_text())
    for unit in found.units:
        assert unit.name in page.text
        for remedy in unit.remedies:
            assert remedy.reason in page.text and remedy.how in page.text
    assert f"image_{SAMPLE}.png" in page.text
    assert any(unit.remedies for unit in found.units)
    assert len(page.all("svg")) >= 3
    for heading in ("Kurtosis: inputs", "Kurtosis: weights", "Share of the range that the top 0.1 % use: inputs"):
        assert heading in page.text


def test_the_first_layer_that_differs_is_named() -> None:
    differences = [
        LayerDifference("a", 0, 1e-6, 0.0),
        LayerDifference("b", 1, 0.2, 1e-6),
        LayerDifference("c", 0, 0, 1),
    ]
    section = difference_section(differences, "net.onnx")
    assert section.text[0].startswith("b is the first layer of net.onnx that computes something else in onnxruntime")
    assert [row.mark for row in section.tables[0].rows] == ["", "differs here", ""]
    assert section.tables[0].rows[1].cells[0] == "b, call 2"
    assert "No layer of net.onnx" in difference_section(differences[:1], "net.onnx").text[0]
    assert "What c is given differs" in difference_section(differences[2:], "net.onnx").text[0]
