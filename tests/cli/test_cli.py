from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from repapq_plugin.cli import main
from repapq_plugin.report.table import Row, comparison_table


@pytest.mark.parametrize("command", [[], ["quantize"], ["eval"], ["export"]])
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
