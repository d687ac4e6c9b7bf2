from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from rich.console import Console

from repapq_plugin.cli import main
from repapq_plugin.report.table import Row, comparison_table
from repapq_plugin.targets import TARGETS
from tests.support.checked_graphs import Clean


@pytest.mark.parametrize("command", [[], ["quantize"], ["compare"], ["sensitivity"], ["eval"], ["export"]])
def test_help_says_what_goes_in_and_what_comes_out(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "CONFIG" in out
    assert "\b" not in out


@pytest.mark.parametrize("words", [["quantise"], ["quantize"], ["quantize", "a.py", "--bits", "4"], ["eval", "a.py"]])
def test_words_that_are_not_understood_end_in_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "Usage: repapq" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quantize", "nowhere.py"], "The config nowhere.py does not exist."),
        (["quantize", "nowhere.py", "-q", "steps"], "--quantizer 'steps' is not allowed; write KEY=VALUE."),
        (
            ["quantize", "nowhere.py", "-q", "a.b=1", "-q", "a=2"],
            "--quantizer 'a=2' is not allowed after a={'b': 1}; leave one of them out.",
        ),
        (["compare", "nowhere.py"], "The config nowhere.py does not exist."),
        (["compare", "nowhere.py", "--seeds", "0,a"], "--seeds '0,a' is not allowed; write whole numbers with commas"),
        (["compare", "nowhere.py", "--method", "qrdop"], "method='qrdop' is not allowed; choose from min-max"),
        (["compare", "nowhere.py", "--peer", "ncnf"], "peer='ncnf' is not allowed; choose from onnxruntime, nncf, esp"),
        (["eval", "nowhere.py", "a.pt"], "a.pt is not a result; give a file ending in .safetensors"),
        (["eval", "nowhere.py", "a.onnx", "--backend", "simulated"], "needs a .safetensors or .pth result"),
    ],
)
def test_wrong_input_ends_in_code_1_and_a_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_package_and_its_command_load_no_host() -> None:
    code = (
        "import sys, repapq_plugin, repapq_plugin.cli\n"
        "hosts = {'mmengine', 'mmdet', 'mmyolo', 'mmpretrain', 'mmseg', 'mmcv', 'nncf', 'torchao', 'openvino',"
        " 'onnxruntime', 'matplotlib'}\n"
        "print(sorted(hosts & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_table_leaves_out_what_is_not_known() -> None:
    rows = [
        Row("float", {"mAP": 0.61234, "top-1 %": 92.128}, size_bytes=4_700_000, latency_ms=12.04),
        Row("RepAPQ", {"mAP": None}, size_bytes=47_000),
    ]
    console = Console(width=100, record=True, file=Path("/dev/null").open("w"))
    console.print(comparison_table(rows, ["mAP", "top-1 %"], "W6A6", "how it was timed"))
    lines = console.export_text().splitlines()
    first = next(line for line in lines if "float" in line)
    second = next(line for line in lines if "RepAPQ" in line)
    assert [cell in first for cell in ("0.6123", "92.13", "4.70 MB", "12.04 ms")] == [True] * 4
    assert second.count(" - ") == 3
    assert "47.0 kB" in second


# -- targets ------------------------------------------------------------------------------------------------------


def test_targets_are_listed_and_one_is_told_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(TARGETS)
    assert "activations per tensor symmetric signed" in lines[3]
    assert main(["targets", "tensorrt"]) == 0
    page = capsys.readouterr().out
    assert all(rule.key in page and rule.source in page for rule in TARGETS["tensorrt"].rules)
    assert all(note in page for note in TARGETS["tensorrt"].notes)
    assert main(["targets", "tensort"]) == 1
    assert "Did you mean 'tensorrt'?" in capsys.readouterr().err


def test_a_file_is_checked_against_a_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean = Clean("uint8")
    path = tmp_path / "model.onnx"
    onnx.save(clean.model, path)
    assert main(["check", str(path)]) == 0
    assert capsys.readouterr().out.strip() == f"The file keeps all {len(TARGETS['generic'].rules)} rules of generic."
    assert main(["check", str(path), "--target", "tensorrt", "--shown", "2"]) == 1
    out = capsys.readouterr().out
    assert out.count("activations are uint8, not int8") == 2 and "'a0.q'" in out
    assert "4 more findings of rule activation_type." in out
    assert f"6 findings against {len(TARGETS['tensorrt'].rules)} rules of tensorrt." in out
    assert main(["check", str(tmp_path / "none.onnx")]) == 1
    assert "There is no file" in capsys.readouterr().err
