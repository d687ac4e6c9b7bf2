"""The command line, from a config to files and back, and what it does when something is wrong."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from integration.openmmlab.scenes import ASSETS, DETECTOR, DETECTOR_W6A6, FEW_SCENES, ROOT, options
from repapq_plugin.cli import main
from repapq_plugin.errors import HostError
from repapq_plugin.hosts.openmmlab.work import writable_folder
from tests.support.markup import Markup

KEPT = {"checkpoint.json", "checkpoint.lock", "part-00000.safetensors"}
"""What is kept of a calibration that has found its ranges."""

SHIPPED = ASSETS / "yolov6-n_fashion.pth"
# With fewer scenes to calibrate on, the network's output on others is no better for learning, which is then undone.
SCORED = tuple(option.replace("16", "128" if option.startswith("calib") else "48") for option in FEW_SCENES)


@pytest.fixture(scope="module")
def quantized(home: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """What ``repapq quantize`` makes of the detector that ships with the repository."""
    folder = home / "quantized"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        words = ["quantize", str(DETECTOR_W6A6), str(SHIPPED), "-w", str(folder), "-q", "steps=2", *options(SCORED)]
        assert main(words) == 0
    yield folder, json.loads((folder / "result.json").read_text())


def test_quantize_scores_exports_times_and_records(quantized: tuple[Path, dict[str, Any]]) -> None:
    folder, record = quantized
    for name, paths in record["files"].items():
        assert all(Path(path).stat().st_size > 0 for path in paths), name
    assert set(record["scores"]) == {"float", "plain_ptq", "repapq", "openvino"}
    scores = {name: metrics["coco/bbox_mAP"] for name, metrics in record["scores"].items()}
    assert scores["float"] > 0.3
    assert scores["repapq"] == pytest.approx(scores["float"], abs=0.05)
    assert scores["openvino"] == pytest.approx(scores["repapq"], abs=0.02)
    assert record["size_bytes"]["onnx"] < 0.5 * record["size_bytes"]["float"]
    assert record["latency"]["median_ms"].keys() == {"float", "openvino"}
    assert any(kernel.endswith("I8") for kernel in record["kernels"]["openvino"].values())
    assert not any(kernel.endswith("I8") for kernel in record["kernels"]["float"].values())
    units = record["calibration"]["units"]
    assert units and {"name", "stage", "loss_before", "loss_after", "kept", "seconds"} <= units[0].keys()
    assert any(unit["kept"] for unit in units)
    assert record["settings"]["quantizer"]["seed"] == 0
    assert {"repapq_plugin", "torch", "mmyolo", "openvino"} <= record["versions"].keys()


def test_the_report_shows_scores_predictions_and_every_unit(quantized: tuple[Path, dict[str, Any]]) -> None:
    folder, record = quantized
    assert record["files"]["report"] == [str(folder / "report.html")]
    page = Markup((folder / "report.html").read_text())
    assert f"{record['scores']['openvino']['coco/bbox_mAP']:.4f}" in page.text
    assert len(page.all("img")) == 3 and all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert {unit["name"] for unit in record["calibration"]["units"]} <= set(page.text.split())
    assert len(page.all("svg")) > 20
    assert "No predictions are drawn" not in page.text


def _evaluate(capsys: pytest.CaptureFixture[str], folder: Path, file: str, *more: str) -> float:
    words = ["eval", str(DETECTOR_W6A6), str(folder / file), "-w", str(folder / "eval"), *more, *options(SCORED)]
    assert main(words) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    return float(lines["coco/bbox_mAP"])


def test_eval_of_every_backend_repeats_the_scores(
    quantized: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, record = quantized
    scores = {name: metrics["coco/bbox_mAP"] for name, metrics in record["scores"].items()}
    assert _evaluate(capsys, folder, "repapq.safetensors") == pytest.approx(scores["repapq"], abs=1e-6)
    assert _evaluate(capsys, folder, "repapq.xml") == pytest.approx(scores["openvino"], abs=1e-6)
    assert _evaluate(capsys, folder, "repapq.onnx") == pytest.approx(scores["repapq"], abs=0.01)


def test_export_writes_the_same_network_again(quantized: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = quantized
    result, target = str(folder / "repapq.safetensors"), tmp_path / "again.onnx"
    words = ["export", str(DETECTOR_W6A6), result, "--out", str(target), "-w", str(tmp_path), *options(SCORED)]
    assert main(words) == 0
    assert target.read_bytes() == (folder / "repapq.onnx").read_bytes()


def test_a_plain_config_needs_only_a_preset(detector_checkpoint: Path, tmp_path: Path) -> None:
    words = ["quantize", str(DETECTOR), str(detector_checkpoint), "--preset", "w3a5", "-w", str(tmp_path / "work")]
    words += ["--no-compare", "--export", "none", "--calib-samples", "8", "--seed", "3", "-q", "steps=0"]
    assert main([*words, *options(FEW_SCENES)]) == 0
    record = json.loads((tmp_path / "work" / "result.json").read_text())
    assert record["scheme"].startswith("W3A5")
    assert (record["settings"]["num_samples"], record["settings"]["quantizer"]["seed"]) == (8, 3)
    assert list(record["scores"]) == ["repapq"]


def _refused(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> str:
    """Run a command that must fail with code 1 and a short message."""
    assert main(["quantize", *words, "-w", str(folder), *options(FEW_SCENES)]) == 1
    # At the start of a line: other errors than the command's own may be logged before.
    message = re.split(r"^Error: ", capsys.readouterr().err, maxsplit=1, flags=re.MULTILINE)[1]
    assert message.count("\n") <= 3
    assert not list(folder.rglob("*.safetensors"))
    return message


def test_bad_input_is_said_in_a_line_and_nothing_is_written(
    detector_checkpoint: Path, classifier_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, checkpoint = str(DETECTOR_W6A6), str(detector_checkpoint)
    folder = tmp_path / "work"
    assert "keys missing (backbone" in _refused(capsys, folder, config, str(classifier_checkpoint))
    assert "nowhere.pth does not exist" in _refused(capsys, folder, config, "nowhere.pth")
    assert "weight_bits=9" in _refused(capsys, folder, config, checkpoint, "--preset", "w9a9")
    assert "bits is not a key" in _refused(capsys, folder, config, checkpoint, "-q", "bits=4")
    assert "write KEY=VALUE" in _refused(capsys, folder, config, checkpoint, "--cfg-options", "model")
    no_loader = _refused(capsys, folder, config, checkpoint, "--calib-dataloader", "none_dataloader")
    assert "none_dataloader" in no_loader
    broken = tmp_path / "broken.py"
    broken.write_text("model = dict(\n")
    assert "broken.py cannot be read: SyntaxError" in _refused(capsys, folder, str(broken), checkpoint)
    empty = tmp_path / "empty.py"
    empty.write_text(f"_base_ = {str(DETECTOR)!r}\ncalib_dataloader = dict(_delete_=True, dataset=[], batch_size=1)\n")
    options_of_calibration = [word for word in FEW_SCENES if not word.startswith("calib")]
    words = ["quantize", str(empty), checkpoint, "-w", str(folder), *options(tuple(options_of_calibration))]
    assert main(words) == 1
    assert "calib_dataloader holds no sample" in capsys.readouterr().err
    unscored = tmp_path / "unscored.py"
    unscored.write_text(f"_base_ = {str(DETECTOR)!r}\ntest_dataloader = None\ntest_evaluator = None\n")
    assert main(["quantize", str(unscored), checkpoint, "-w", str(folder)]) == 1
    assert "no test_dataloader" in capsys.readouterr().err


@contextmanager
def _somebody_else() -> Iterator[None]:
    """Act as a user whom file permissions apply to."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_work_folder_that_cannot_be_written_is_refused_first(
    detector_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    with _somebody_else(), pytest.raises(HostError, match="cannot be written"):
        writable_folder(folder)
    file = tmp_path / "file"
    file.write_text("not a folder")
    assert main(["quantize", str(DETECTOR_W6A6), str(detector_checkpoint), "-w", str(file / "below")]) == 1
    assert "below cannot be written: Not a directory" in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_result_and_nothing_half_written(
    detector_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "repapq.safetensors").write_text("older")
    words = ["quantize", str(DETECTOR), str(detector_checkpoint), "-w", str(folder), "--no-compare", "-q", "steps=0"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A file may grow to 200 kB: enough for logs, not for a network.
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        code = main([*words, *options(FEW_SCENES)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    assert "repapq.safetensors" in capsys.readouterr().err
    assert (folder / "repapq.safetensors").read_text() == "older"
    assert {path.name for path in folder.iterdir()} == {"repapq.safetensors", "repapq.log", "toolbox", "checkpoint"}
    assert {path.name for path in (folder / "checkpoint").iterdir()} == KEPT


def test_interrupting_a_calibration_leaves_nothing_half_written(detector_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    words = ["quantize", str(DETECTOR), str(detector_checkpoint), "-w", str(folder), "--no-compare"]
    words += ["-q", "steps=1000000", *options(FEW_SCENES)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "repapq_plugin", *words],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # In the background of a script the tests themselves ignore an interrupt, which children would inherit.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        log = folder / "repapq.log"
        while not (log.is_file() and "Calibrating RepAPQ" in log.read_text()):
            assert process.poll() is None, process.stderr
            time.sleep(0.2)
        while not (folder / "checkpoint" / "part-00000.safetensors").is_file():
            assert process.poll() is None, process.stderr
            time.sleep(0.2)
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Interrupted" in errors
    assert "Traceback" not in errors
    assert "Finished parts of the calibration are kept: 1. Give the same command with --resume to go on." in errors
    assert {path.name for path in folder.iterdir()} == {"repapq.log", "toolbox", "checkpoint"}
    assert {path.name for path in (folder / "checkpoint").iterdir()} == KEPT
