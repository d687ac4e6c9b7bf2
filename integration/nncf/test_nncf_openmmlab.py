"""`quantizer=dict(type='NNCF')`: NNCF's quantizers in the toolboxes' own test loop, scored by their own metric."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner import Runner
from nncf.torch.function_hook import get_hook_storage

from integration.openmmlab.scenes import ASSETS, CLASSIFIER, DETECTOR, FEW_ITEMS, FEW_SCENES, random_checkpoint
from repapq_plugin.errors import ConfigError, ExportError, HostError
from repapq_plugin.hosts.nncf import load
from repapq_plugin.hosts.nncf.hosted import NNCFNetwork
from repapq_plugin.hosts.openmmlab import RepAPQTestLoop, TensorPath
from repapq_plugin.hosts.openmmlab.network import preprocess
from repapq_plugin.hosts.openmmlab.other_hosts import find_host
from repapq_plugin.hosts.openmmlab.settings import Settings
from repapq_plugin.hosts.openmmlab.workbench import open_config
from repapq_plugin.job import merge_for_inference


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    # A deep network of random weights lets nothing through 8 bits, and two that give nothing but biases are alike.
    return {
        "detector": ASSETS / "yolov6-n_fashion.pth",
        "classifier": random_checkpoint(CLASSIFIER, folder / "classifier.pth"),
    }


def config(kind: str, checkpoint: Path, folder: Path, **test_cfg: Any) -> Any:
    cfg = open_config(*((DETECTOR, FEW_SCENES) if kind == "detector" else (CLASSIFIER, FEW_ITEMS)))
    cfg.work_dir, cfg.load_from, cfg.experiment_name = str(folder), str(checkpoint), folder.name
    cfg.custom_imports = {"imports": ["repapq_plugin.hosts.openmmlab"], "allow_failed_imports": False}
    cfg.test_cfg = {"type": "RepAPQTestLoop", "calibration": {"num_samples": 16}, **test_cfg}
    return cfg


def test_a_detector_is_quantized_by_nncf_and_scored_on_openvino(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quantizer = {"type": "NNCF", "preset": "w8a8", "steps": 1, "options": {"target_device": "CPU"}}
    cfg = config("detector", checkpoints["detector"], tmp_path / "work", quantizer=quantizer, backend="openvino")
    runner = Runner.from_cfg(cfg)
    metrics = runner.test()
    record = json.loads((tmp_path / "work" / "result.json").read_text())
    assert record["scores"]["openvino"] == pytest.approx(metrics)
    assert record["settings"]["host"] == "NNCF"
    assert record["exports"]["openvino"]["integer_layers"] > 20
    assert (tmp_path / "work" / "repapq.xml").is_file()
    loop = runner.test_loop
    assert isinstance(loop, RepAPQTestLoop) and loop.result is not None
    assert all(unit.loss_after < 0.05 for unit in loop.result.units)
    network = loop.result.model
    assert isinstance(network, TensorPath) and not get_hook_storage(network).is_empty()
    with torch.no_grad():
        wanted = network(loop.quantization.example)
        got = loop.network(loop.quantization.example)  # type: ignore[misc]
    for ours, theirs in zip(got, wanted, strict=True):
        assert float((ours - theirs).abs().mean()) < 0.02 * float(theirs.abs().mean())


def test_a_classifier_is_scored_simulated_and_its_state_comes_back(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quantizer = {"type": "NNCF", "preset": "w4a4", "steps": 1}
    cfg = config("classifier", checkpoints["classifier"], tmp_path / "work", quantizer=quantizer)
    runner = Runner.from_cfg(cfg)
    metrics = runner.test()
    record = json.loads((tmp_path / "work" / "result.json").read_text())
    assert record["scores"]["repapq"] == pytest.approx(metrics)
    assert record["scheme"].startswith("W4A4") and record["calibration"]["units"]
    loop = runner.test_loop
    example = loop.quantization.example
    with torch.no_grad():
        fresh, *_ = merge_for_inference(TensorPath(runner.model), lambda model: model(example))
        restored = load(tmp_path / "work" / "nncf.pth", fresh)
        images = preprocess(runner.model, next(iter(runner.test_dataloader)))["inputs"]
        (ours,), (theirs,) = restored(images), loop.network(images)
    assert torch.equal(ours, theirs)
    with pytest.raises(ExportError, match="exported to OpenVINO, not to onnx"):
        NNCFNetwork(loop.result).export("onnx", example, tmp_path / "network")


@pytest.mark.parametrize(
    ("quantizer", "words"),
    [
        ({"type": "Nncf"}, "quantizer.type='Nncf' is not allowed; choose RepAPQ, NNCF"),
        ({"options": {"target_device": "CPU"}}, "options=.*without quantizer.type"),
    ],
)
def test_engines_that_do_not_exist_are_named(quantizer: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Settings.from_values(quantizer)


def test_an_engine_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(HostError, match="nowhere:nothing.*cannot be imported"):
        find_host("nowhere:nothing")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "CPU"}, "options.device is not a key.*target_device"),
        ({"target_device": "TPU"}, "target_device='TPU' is not allowed; choose one of ANY, CPU"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        find_host("NNCF")(torch.nn.Identity(), [torch.zeros(1)], Settings().quantizer, None, options)
