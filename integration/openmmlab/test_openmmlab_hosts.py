"""``quantizer=dict(type='TorchAO' | 'PT2E')``: another host runs the network, or the record says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner import Runner
from mmpretrain.models.backbones import RepVGG
from mmpretrain.registry import MODELS
from torch.ao.nn import quantized as nnq

from integration.openmmlab.scenes import CLASSIFIER, DETECTOR, FEW_ITEMS, FEW_SCENES
from repapq_plugin.core.tensors import tensors_of
from repapq_plugin.errors import ConfigError, HostError
from repapq_plugin.hosts.openmmlab.network import preprocess
from repapq_plugin.hosts.openmmlab.workbench import open_config

QUICK = {"preset": "w8a8", "steps": 0, "activation_observer": "min_max", "equalize": False}


def runner_of(config: Path, few: tuple[str, ...], checkpoint: Path, folder: Path, **quantizer: Any) -> Runner:
    cfg = open_config(config, few)
    cfg.work_dir, cfg.load_from, cfg.experiment_name = str(folder), str(checkpoint), folder.name
    quantizer = {**QUICK, **quantizer}
    cfg.test_cfg = {"type": "RepAPQTestLoop", "calibration": {"num_samples": 16}, "quantizer": quantizer}
    return Runner.from_cfg(cfg)


@pytest.mark.parametrize("kind", ["TorchAO", "PT2E"])
def test_the_detector_is_scored_by_another_host(kind: str, detector_checkpoint: Path, tmp_path: Path) -> None:
    runner = runner_of(DETECTOR, FEW_SCENES, detector_checkpoint, tmp_path / kind, type=kind)
    metrics = runner.test()
    record = json.loads((tmp_path / kind / "result.json").read_text())
    assert record["scores"]["repapq"] == pytest.approx(metrics)
    assert record["settings"]["host"] == kind
    assert not any(note.startswith("The network runs simulated") for note in record["calibration"]["notes"])
    assert (tmp_path / kind / "repapq.safetensors").stat().st_size > 100_000
    loop: Any = runner.test_loop
    images = preprocess(runner.model, next(iter(runner.test_dataloader)))["inputs"]
    with torch.no_grad():
        calibrated = tensors_of(loop.result.model(images))
        other = tensors_of(loop.network(images))
    for expected, got in zip(calibrated, other, strict=True):
        if kind == "PT2E":
            assert torch.equal(got, expected)
        else:  # random weights, 8 bits for the outputs too, and integers that round a bias
            assert (got - expected).abs().mean() < 0.1 * expected.abs().mean()
    if kind == "TorchAO":
        assert sum(isinstance(module, nnq.Conv2d) for module in loop.network.modules()) > 30


class Fickle(RepVGG):
    """Its Python depends on the data."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x if x.sum() > 0 else x * 1.0)


@pytest.mark.parametrize(
    ("kind", "reason"), [("TorchAO", "cannot be traced by torch.fx"), ("PT2E", "cannot be exported")]
)
def test_what_another_host_cannot_take_stays_simulated(
    kind: str, reason: str, classifier_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS._module_dict, "RepVGG", Fickle)
    runner = runner_of(CLASSIFIER, FEW_ITEMS, classifier_checkpoint, tmp_path / kind, type=kind)
    metrics = runner.test()
    record = json.loads((tmp_path / kind / "result.json").read_text())
    assert record["scores"]["repapq"] == pytest.approx(metrics)
    assert any(reason in note for note in record["calibration"]["notes"])
    loop: Any = runner.test_loop
    assert loop.network is loop.result.model


def test_options_are_checked(classifier_checkpoint: Path, tmp_path: Path) -> None:
    for name, quantizer, error, message in (
        ("one", {"type": "TorchAO", "options": {"engine": "x86"}}, ConfigError, "options.engine is not a key"),
        ("two", {"type": "TorchAO", "options": {"backend": "tpu"}}, ConfigError, "backend='tpu' is not allowed"),
        ("three", {"type": "PT2E", "options": {"strict": True}}, ConfigError, "options.strict is not a key"),
        ("four", {"type": "Torch"}, ConfigError, "quantizer.type='Torch' is not allowed"),
    ):
        with pytest.raises((error, HostError), match=message):
            runner_of(CLASSIFIER, FEW_ITEMS, classifier_checkpoint, tmp_path / name, **quantizer).test()
