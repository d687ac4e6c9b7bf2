"""What the command says where it has to look into the OpenMMLab host."""

from __future__ import annotations

from pathlib import Path

import pytest

from repapq_plugin.cli import main


def test_help_names_every_part_of_the_record(capsys: pytest.CaptureFixture[str]) -> None:
    import dataclasses

    from repapq_plugin.hosts.openmmlab.record import Record

    main(["quantize", "--help"])
    out = capsys.readouterr().out
    assert [field.name for field in dataclasses.fields(Record) if field.name not in out] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "nowhere.py", "a.onnx"], "a.onnx is exported already"),
        (["export", "nowhere.py", "a.safetensors", "--format", "onnx", "-o", "a.xml"], "end it in .onnx"),
    ],
)
def test_a_wrong_export_ends_in_code_1_and_a_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []
