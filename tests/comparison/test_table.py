from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from repapq_plugin.comparison.page import write_comparison
from repapq_plugin.comparison.show import lines_below, shown_table
from repapq_plugin.comparison.table import Comparison, Row, finite

TABLE = Comparison(
    scheme="W4A4: weights so, activations so",
    calibration="8 calibration samples",
    floats={"top-1 %": 92.0, "other": 1.0},
    metrics={"top-1 %": "top-1 %"},
    rows=(
        Row("a", "Method A", "us 1", "W4A4 (mse)", 0, simulated={"top-1 %": 90.0}, cpu_seconds=2.0, peak_bytes=3),
        Row("a", "Method A", "us 1", "W4A4 (mse)", 1, simulated={"top-1 %": 91.0}, cpu_seconds=4.0, peak_bytes=5),
        Row("b", "Method B", "peer 2", "W8A8 only", failed="it cannot do 4 bits"),
    ),
)


def test_seeds_of_a_method_are_counted_together() -> None:
    first, second = TABLE.summaries()
    assert (first.seeds, first.cpu_seconds, first.peak_bytes) == (2, 3.0, 5)
    assert first.simulated["top-1 %"] == (90.5, pytest.approx(0.7071, abs=1e-4))
    assert (second.seeds, second.simulated, second.row.failed) == (0, {}, "it cannot do 4 bits")


def test_a_row_takes_the_place_of_the_one_with_its_method_and_seed() -> None:
    new = Row("a", "Method A", "us 1", "W4A4 (mse)", 1, failed="gone")
    assert TABLE.with_row(new).rows == (TABLE.rows[0], new, TABLE.rows[2])
    assert TABLE.with_row(Row("c", "C", "", "")).rows[3].method == "c"


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    assert [path.name for path in TABLE.save(tmp_path)] == ["comparison.json", "comparison.csv"]
    assert Comparison.load(tmp_path) == TABLE


def test_the_table_shows_every_scheme_and_every_reason() -> None:
    console = Console(width=200, record=True, file=StringIO())
    console.print(shown_table(TABLE))
    text = console.export_text()
    for part in ("W4A4: weights so", "Method A (2 seeds)", "90.50 ± 0.71", "1.50", "Method B"):
        assert part in text
    assert list(lines_below(TABLE)) == [
        "scheme: Method A: W4A4 (mse)",
        "scheme: Method B: W8A8 only",
        "Method B: no figures: it cannot do 4 bits",
    ]


def test_the_page_shows_them_too_and_loads_nothing(tmp_path: Path) -> None:
    text = write_comparison(TABLE, tmp_path / "page.html").read_text()
    for part in (TABLE.scheme, "Method A (2 seeds)", "90.50 ± 0.71", "W4A4 (mse)", "W8A8 only", "it cannot do 4 bits"):
        assert part in text
    assert text.count("<svg") == 1 and "<script" not in text and 'src="http' not in text
    assert "1.50 below float" in text


def test_scores_are_finite_numbers_by_name() -> None:
    assert finite(0.5) == {"score": 0.5}
    assert finite({"a": 1, "b": float("nan"), "c": "text", "d": float("inf")}) == {"a": 1.0}
