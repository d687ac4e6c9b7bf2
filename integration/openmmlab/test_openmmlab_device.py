"""``--device``: where the model of a config runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from integration.openmmlab.scenes import CLASSIFIER, FEW_ITEMS, options
from repapq_plugin.cli import main
from repapq_plugin.hosts.openmmlab.workbench import Workbench, open_config


def test_the_command_takes_a_device(classifier_checkpoint: Path, tmp_path: Path) -> None:
    more = ["-w", str(tmp_path), "--device", "cpu", *options(FEW_ITEMS)]
    words = ["quantize", str(CLASSIFIER), str(classifier_checkpoint), "--no-compare", "--export", "none"]
    assert main([*words, "-q", "steps=0", *more]) == 0
    assert main(["eval", str(CLASSIFIER), str(tmp_path / "repapq.safetensors"), *more]) == 0


@pytest.mark.parametrize("command", ["quantize", "eval"])
def test_a_device_that_is_not_there_is_said_before_any_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [command, str(CLASSIFIER), str(tmp_path / "a.safetensors"), "--device", "nothing:3"]
    assert main([*words, "-w", str(tmp_path / "work")]) == 1
    assert "--device 'nothing:3' is not allowed; torch finds cpu" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_model_and_batches_are_on_the_device(classifier_checkpoint: Path, tmp_path: Path) -> None:
    """The device without memory stands in for an accelerator: it shows where a tensor is, and computes nothing."""
    cfg = open_config(CLASSIFIER, FEW_ITEMS)
    plain = Workbench(cfg, str(classifier_checkpoint), tmp_path / "plain")
    assert {tensor.device.type for tensor in plain.model.state_dict().values()} == {"cpu"}
    moved = Workbench(cfg, None, tmp_path / "moved", need_weights=False, device=torch.device("meta"))
    assert {tensor.device.type for tensor in moved.model.state_dict().values()} == {"meta"}
    assert moved.example.device.type == "meta" and plain.example.device.type == "cpu"
