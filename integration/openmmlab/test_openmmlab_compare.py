"""``repapq compare``, from a config to one table by the toolbox's own metric."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.openmmlab.scenes import CLASSIFIER, FEW_ITEMS, options
from repapq_plugin.cli import main
from repapq_plugin.comparison import Comparison


def compare(checkpoint: Path, folder: Path, *more: str) -> int:
    words = ["compare", str(CLASSIFIER), str(checkpoint), "-w", str(folder), "--preset", "w4a4", *more]
    return main([*words, *options(FEW_ITEMS)])


def test_methods_are_compared_by_the_toolbox_and_not_made_again(
    classifier_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--method", "min-max", "--method", "adaround", "--runtime", "onnxruntime", "--no-latency")
    assert compare(classifier_checkpoint, tmp_path, *words) == 0
    shown = capsys.readouterr().out
    assert "W4A4: weights per channel symmetric narrow range" in shown and "top-1 %" in shown
    assert "AdaRound: no figures: rounding is not learned here" in shown
    table = Comparison.load(tmp_path / "comparison")
    row = table.row("min-max", None)
    assert row is not None and row.failed == ""
    assert "accuracy/top1" in row.simulated and row.simulated.keys() == row.integer.keys() == table.floats.keys()
    assert (row.peak_bytes or 0) > 100e6 and (row.cpu_seconds or 0) > 0 and row.latency_ms is None
    network = tmp_path / "comparison" / "networks" / "min-max" / "repapq.safetensors"
    made = network.stat().st_mtime_ns
    assert compare(classifier_checkpoint, tmp_path, *words) == 0
    assert network.stat().st_mtime_ns == made and capsys.readouterr().out == shown


def test_another_host_is_not_compared_here(
    classifier_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(classifier_checkpoint, tmp_path, "-q", "type=NNCF") == 1
    assert "quantizer.type='NNCF' is not compared; leave it out, and name a peer with --peer" in capsys.readouterr().err
