"""Methods side by side: each row says what was done, what it gave and what it took; nothing is done twice or lost."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from repapq_plugin import CalibrationResult, RepAPQConfig, quantize_model
from repapq_plugin.comparison import METHODS, Comparison, compare
from repapq_plugin.comparison.tasks import NETWORKS
from repapq_plugin.errors import ConfigError, ResultError
from tests.support.networks import Chain, batches, settle

W4 = RepAPQConfig(weight_bits=4, activation_bits=4, steps=2)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(1)
    return settle(Chain((8, 12), 1))


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    torch.manual_seed(2)
    return batches(2)


@pytest.fixture(scope="module")
def snr(model: nn.Module, data: list[Tensor]) -> Callable[[nn.Module], dict[str, float]]:
    x = torch.cat(data)
    with torch.no_grad():
        wanted = model(x)

    def score(network: nn.Module) -> dict[str, float]:
        noise = (network(x) - wanted).pow(2).sum()
        return {"snr": float(10 * torch.log10(wanted.pow(2).sum() / noise.clamp(min=1e-12))), "wrong": float("nan")}

    return score


def test_rows_say_what_was_done_and_what_it_took(
    model: nn.Module, data: list[Tensor], snr: Callable[[nn.Module], dict[str, float]], tmp_path: Path
) -> None:
    names = ["min-max", "adaround", "repapq"]
    table = compare(model, data, snr, W4, methods=names, seeds=[5], folder=tmp_path)
    assert [row.key for row in table.rows] == [("float", None), ("min-max", None), ("adaround", None), ("repapq", 5)]
    by = {row.method: row for row in table.rows}
    assert by["adaround"].failed == METHODS["adaround"].reason and not by["adaround"].simulated
    plain = quantize_model(model, data, W4.plain())
    assert by["min-max"].simulated == pytest.approx({"snr": snr(plain.model)["snr"]}, abs=0.01)
    for name in ("min-max", "repapq"):
        row = by[name]
        assert row.scheme.startswith("W4A4: weights per channel symmetric narrow range (")
        assert row.integer["snr"] == pytest.approx(row.simulated["snr"], abs=0.5)
        assert row.cpu_seconds is not None and row.cpu_seconds > 0
        assert row.peak_bytes is not None and 100e6 < row.peak_bytes < 10e9
        assert row.latency_ms is not None and row.float_ms is not None and min(row.latency_ms, row.float_ms) > 0
        # The first and the last layer keep 8 bits.
        assert row.weight_bits is not None and 4 < row.weight_bits < 8
        assert row.packed_bytes is not None and row.packed_bytes < 0.35 * (by["float"].packed_bytes or 0)
    saved = CalibrationResult.load(tmp_path / NETWORKS / "repapq-5" / "repapq.safetensors", model)
    assert saved.config == METHODS["repapq"].config(W4, 5)
    assert table.drop(by["repapq"].simulated)["snr"] == pytest.approx(
        table.floats["snr"] - by["repapq"].simulated["snr"]
    )
    assert "RepAPQ" in (tmp_path / "comparison.html").read_text()
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "comparison.svg").read_text().startswith("<?xml")
    written = (tmp_path / "comparison.json").read_bytes()
    again = compare(model, data, snr, W4, methods=names, seeds=[5], folder=tmp_path)
    assert again == table == Comparison.load(tmp_path) and (tmp_path / "comparison.json").read_bytes() == written
    lines = list(csv.DictReader((tmp_path / "comparison.csv").open()))
    assert [line["method"] for line in lines] == ["float", *names]
    assert float(lines[3]["simulated snr"]) == by["repapq"].simulated["snr"] and lines[2]["failed"]
    with pytest.raises(ConfigError, match=r"another comparison: config.weight_bits was 4 and is 6.* Choose another"):
        compare(model, data, snr, W4.replace(weight_bits=6), methods=names, folder=tmp_path)


class Held(Chain):
    """A network that cannot be pickled."""

    def __init__(self) -> None:
        super().__init__((8,), 1)
        self.note = lambda: None


@pytest.fixture
def held() -> nn.Module:
    torch.manual_seed(3)
    return settle(Held())


def test_a_failure_loses_no_other_row_and_is_tried_again(held: nn.Module, data: list[Tensor], tmp_path: Path) -> None:
    calls = 0

    def score(network: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError("no room")
        return float(network(data[0]).mean())

    def run() -> Comparison:
        return compare(
            held, data, score, W4, methods=["min-max", "percentile"], folder=tmp_path, runtime="none", latency=False
        )

    first = run()
    assert [row.failed for row in first.rows] == ["", "MemoryError: no room", ""]
    assert first.rows[2].simulated and first.rows[2].runtime == "" and first.rows[2].size_bytes is None
    kept = (tmp_path / NETWORKS / "percentile" / "repapq.safetensors").stat().st_mtime_ns
    second = run()
    assert [row.failed for row in second.rows] == ["", "", ""] and second.rows[2] == first.rows[2]
    assert (tmp_path / NETWORKS / "percentile" / "repapq.safetensors").stat().st_mtime_ns == kept


def test_what_cannot_go_to_another_process_is_calibrated_in_this_one_and_said_so(
    held: nn.Module, data: list[Tensor]
) -> None:
    table = compare(held, data, lambda net: float(net(data[0]).mean()), W4, methods=["mae"], runtime="none")
    row = table.rows[1]
    assert row.simulated.keys() == {"score"} and row.peak_bytes is None and row.cpu_seconds is not None
    assert "cannot go to a process of its own" in row.notes[0]


def test_a_calibration_that_is_refused_says_why(held: nn.Module, data: list[Tensor]) -> None:
    config = W4.replace(layer_bits={"nowhere": (4, 4)})
    table = compare(held, data, lambda net: float(net(data[0]).mean()), config, methods=["min-max"], runtime="none")
    assert "layer_bits: the pattern 'nowhere' matches no module" in table.rows[1].failed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"methods": ["minmax"]}, r"method='minmax' is not allowed; choose from min-max, .*nearest: min-max"),
        ({"seeds": []}, r"seeds=\[\] is not allowed"),
        ({"seeds": [1, 1]}, "name each seed once"),
        ({"seeds": [-1]}, "whole number from 0"),
        ({"runtime": "tensorrt"}, "runtime='tensorrt' is not allowed"),
    ],
)
def test_bad_values_are_refused_before_any_work(
    words: dict[str, object], message: str, model: nn.Module, data: list[Tensor], tmp_path: Path
) -> None:
    def score(network: nn.Module) -> float:
        raise AssertionError("nothing shall be scored")

    with pytest.raises(ConfigError, match=message):
        compare(model, data, score, W4, folder=tmp_path, **words)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_batches_must_be_tensors(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="batches: dict is not allowed; give tensors of samples"):
        compare(model, [{"x": torch.ones(1)}], lambda net: 1.0)  # type: ignore[list-item]


def test_a_file_that_is_no_comparison_is_refused(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps({"format": "other", "version": 1}))
    with pytest.raises(ResultError, match="another format or version"):
        Comparison.load(tmp_path)
