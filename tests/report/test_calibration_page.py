"""The page of a calibration holds every unit, every layer, every setting and every remark."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from repapq_plugin import CalibrationResult, RepAPQConfig, quantize_model
from repapq_plugin.method.unit_result import UnitResult
from repapq_plugin.report import Evidence, calibration_page, render, write_report
from repapq_plugin.report.html import MOST_BYTES
from repapq_plugin.report.page import Page, Section
from repapq_plugin.report.table import Row
from tests.support.markup import Markup
from tests.support.networks import Chain, batches, settle


@pytest.fixture(scope="module")
def result() -> CalibrationResult:
    torch.manual_seed(0)
    config = RepAPQConfig(weight_bits=4, activation_bits=4, steps=0, seed=7)
    made = quantize_model(settle(Chain()), batches(), config)
    units = [
        UnitResult(name, "stage", 0.2, 0.1, index != 1, 1.0, "no better" if index == 1 else "")
        for index, name in enumerate(made.layers)
    ]
    plan = replace(made.plan, float_layers={"head": "it was asked for"})
    return replace(made, units=tuple(units), plan=plan, notes=("A remark.",))


def section(page: Page, title: str) -> Section:
    return next(section for section in page.sections if section.title == title)


def test_the_page_holds_all_that_is_known(result: CalibrationResult, tmp_path: Path) -> None:
    path = write_report(result, tmp_path / "report.html", data=batches())
    assert path.stat().st_size <= MOST_BYTES
    read = Markup(path.read_text())
    for unit in result.units:
        assert unit.name in read.text
    for key in result.config.to_dict():
        assert key in read.text
    assert result.config.scheme in read.text and "A remark." in read.text and "it was asked for" in read.text
    assert "undone: no better" in read.text
    assert len(read.all("svg")) > 5


def test_units_that_were_undone_are_marked(result: CalibrationResult) -> None:
    page = calibration_page(result, Evidence())
    rows = section(page, "Loss of each unit").tables[0].rows
    assert len(rows) == len(result.units)
    assert [row.mark for row in rows if row.mark] == ["undone: no better"]
    assert page.headlines[0].value == f"{len(rows) - 1} of {len(rows)}"


@pytest.mark.parametrize(
    ("score", "said", "good"),
    [(0.797, "+0.0000", True), (0.77, "\N{MINUS SIGN}0.0270", None), (0.6, "\N{MINUS SIGN}0.1970", False)],
)
def test_what_a_reader_wants_first_is_score_size_and_latency(
    score: float, said: str, good: bool | None, result: CalibrationResult
) -> None:
    rows = [Row("float", {"mAP": 0.797}, 4_000_000, 10.0), Row("int8", {"mAP": score}, 1_000_000, 4.0)]
    first = calibration_page(result, Evidence(rows=rows, columns=["mAP"])).headlines
    assert [(it.label, it.value, it.good) for it in first] == [
        ("mAP", f"{score:.4f}", good),
        ("Size of the file", "1.00 MB", None),
        ("Latency", "4.00 ms", None),
    ]
    assert [it.note for it in first] == [
        f"{said} from float (0.7970)",
        "25 % of the float network's 4.00 MB",
        "2.50 times as fast as float (10.00 ms)",
    ]


def test_a_result_without_anything_else_makes_a_page(result: CalibrationResult) -> None:
    bare = replace(result, units=(), merges=(), notes=(), plan=replace(result.plan, float_layers={}))
    read = Markup(render(calibration_page(bare, Evidence())))
    assert "Every convolution and linear layer is quantized." in read.text
    assert read.all("svg") == []
