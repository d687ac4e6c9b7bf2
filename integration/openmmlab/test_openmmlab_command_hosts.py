"""The command line with other hosts: quantized, saved, exported, scored and recorded, and what becomes of the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from integration.openmmlab.scenes import CLASSIFIER, DETECTOR, FEW_ITEMS, FEW_SCENES, options
from repapq_plugin.cli import main

QUICK = ("steps=0", "equalize=False")


def command(*words: str, folder: Path, config: Path = CLASSIFIER, few: tuple[str, ...] = FEW_ITEMS) -> int:
    return main([words[0], str(config), *words[1:], "-w", str(folder), *options(few)])


def told(*pairs: str) -> list[str]:
    return [word for pair in (*QUICK, *pairs) for word in ("-q", pair)]


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return record


def scores_of(capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    lines = capsys.readouterr().out.splitlines()
    return {key: float(value) for key, value in (line.split(": ", 1) for line in lines if line.startswith("accuracy"))}


@pytest.mark.parametrize(
    ("host", "saved", "exports"),
    [
        ("NNCF", "nncf.pth", {"openvino"}),
        ("TorchAO", "repapq.safetensors", {"onnx", "openvino"}),
        ("PT2E", "repapq.safetensors", {"onnx", "openvino"}),
    ],
)
def test_every_host_from_the_command_line(
    host: str,
    saved: str,
    exports: set[str],
    classifier_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "work"
    assert command("quantize", str(classifier_checkpoint), *told(f"type={host}"), folder=folder) == 0
    shown = capsys.readouterr().out
    record = record_of(folder)
    assert f"by {host}" in shown
    assert record["settings"]["host"] == host
    assert (folder / saved).stat().st_size > 0
    assert set(record["scores"]) == {"float", "plain_ptq", "repapq", "openvino"}
    assert set(record["exports"]) == exports | {"float"}
    assert record["latency"]["median_ms"].keys() == {"float", "openvino"}
    # Sixteen images, and integers that round as a host rounds.
    top1 = {name: metrics["accuracy/top1"] for name, metrics in record["scores"].items()}
    assert all(abs(value - top1["float"]) <= 100 * 3 / 16 for value in top1.values())

    assert command("eval", str(folder / "repapq.xml"), folder=tmp_path / "eval") == 0
    assert scores_of(capsys)["accuracy/top1"] == pytest.approx(top1["openvino"])
    for name, scored in (("repapq.xml", "openvino"), (saved, "repapq")):  # each file alone says its config
        assert main(["eval", str(folder / name), "-w", str(tmp_path / "eval")]) == 0
        out = capsys.readouterr().out
        assert f"quantized by {host}" in out
        if scored == "openvino" or host == "NNCF":
            assert f"accuracy/top1: {top1[scored]}" in out
    if saved == "nncf.pth":
        assert command("eval", str(folder / saved), folder=tmp_path / "eval") == 0
        assert scores_of(capsys)["accuracy/top1"] == pytest.approx(top1["repapq"])
        assert command("eval", str(folder / saved), "--backend", "openvino", folder=tmp_path / "eval") == 0
        assert scores_of(capsys)["accuracy/top1"] == pytest.approx(top1["openvino"])
        again = tmp_path / "again.xml"
        words = ("export", str(folder / saved), "--format", "openvino", "--out", str(again))
        assert command(*words, folder=tmp_path / "export") == 0
        assert again.with_suffix(".bin").read_bytes() == (folder / "repapq.bin").read_bytes()
        assert command("export", str(folder / saved), folder=tmp_path / "export") == 1
        assert "NNCF's networks are exported to OpenVINO, not to onnx" in capsys.readouterr().err
        return
    assert command("eval", str(folder / saved), folder=tmp_path / "eval") == 0
    out = capsys.readouterr().out
    assert "was calibrated for another host; here its integers are simulated" in out
    assert command("eval", str(folder / saved), "--backend", "openvino", folder=tmp_path / "eval") == 0
    assert scores_of(capsys)["accuracy/top1"] == pytest.approx(top1["openvino"])
    again = tmp_path / "again.onnx"
    assert command("export", str(folder / saved), "--out", str(again), folder=tmp_path / "export") == 0
    assert again.read_bytes() == (folder / "repapq.onnx").read_bytes()


def test_a_config_that_names_the_host_needs_no_option(detector_checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / "mine.py"
    config.write_text(
        f"_base_ = {str(DETECTOR)!r}\n"
        "repapq = dict(quantizer=dict(\n"
        "    type='NNCF', preset='w8a8', steps=0, equalize=False, options=dict(target_device='CPU')))\n"
    )
    words = ("quantize", str(detector_checkpoint), "--no-compare", "--export", "none")
    assert command(*words, folder=tmp_path / "work", config=config, few=FEW_SCENES) == 0
    record = record_of(tmp_path / "work")
    assert record["settings"]["host"] == "NNCF"
    assert record["settings"]["options"] == {"target_device": "CPU"}
    assert list(record["scores"]) == ["repapq"]
    assert record["exports"] == {}


@pytest.mark.parametrize(
    ("told_so", "message"),
    [
        (["-q", "type=NNCF", "--export", "onnx"], "export='onnx' is not allowed with quantizer.type='NNCF'"),
        (["-q", "type=Nncf"], "quantizer.type='Nncf' is not allowed; choose RepAPQ, NNCF"),
        (["-q", "options.target_device=CPU"], "is not allowed without quantizer.type"),
        (["-q", "steps=1", "-q", "steps.more=2"], "is not allowed after steps=1"),
    ],
)
def test_what_a_host_cannot_do_is_said_before_the_calibration(
    told_so: list[str],
    message: str,
    classifier_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command("quantize", str(classifier_checkpoint), *told_so, folder=tmp_path / "work") == 1
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "work").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (({"options": 5},), "quantizer.options=5 is not allowed; give a dict"),
        (({"type": "TorchAO", "options": "CPU"},), "quantizer.options='CPU' is not allowed; give a dict"),
        (("w6a6",), "quantizer='w6a6' is not allowed; give a dict"),
        ((None, [8]), "calibration=.8. is not allowed; give a dict"),
    ],
)
def test_what_is_no_dict_is_refused_by_name(values: tuple[object, ...], message: str) -> None:
    from repapq_plugin.errors import ConfigError
    from repapq_plugin.hosts.openmmlab.settings import Settings

    with pytest.raises(ConfigError, match=message):
        Settings.from_values(*values)  # type: ignore[arg-type]


def test_a_runtime_that_a_host_has_no_export_for_is_refused(tmp_path: Path) -> None:
    from repapq_plugin.errors import ConfigError
    from repapq_plugin.hosts.openmmlab.settings import Settings

    with pytest.raises(ConfigError, match="backend='onnxruntime' is not allowed with quantizer.type='NNCF'"):
        Settings.from_values({"type": "NNCF"}, backend="onnxruntime")
    assert Settings.from_values({"type": "NNCF"}, export=True).export == ("openvino",)
    assert Settings.from_values(export=True).export == ("onnx", "openvino")
