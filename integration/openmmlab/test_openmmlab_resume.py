"""The command line and the test loop go on with a calibration that was interrupted, and say how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner import Runner
from safetensors.torch import load_file
from torch import Tensor, nn

from integration.openmmlab.scenes import CLASSIFIER, FEW_ITEMS, options
from repapq_plugin.cli import main
from repapq_plugin.core.checkpoints import Checkpoints
from repapq_plugin.errors import CheckpointError, ConfigError
from repapq_plugin.hosts.openmmlab.record import Record
from repapq_plugin.hosts.openmmlab.settings import Settings
from repapq_plugin.hosts.openmmlab.workbench import open_config

QUANTIZER = {"preset": "w4a4", "steps": 1}


def quantize(checkpoint: Path, folder: Path, *more: str) -> int:
    words = ["quantize", str(CLASSIFIER), str(checkpoint), "-w", str(folder), "--no-compare", "--export", "none"]
    return main([*words, "--preset", "w4a4", "-q", "steps=1", "-q", "affine=False", *more, *options(FEW_ITEMS)])


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "repapq.safetensors")


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Somebody presses Ctrl-C once all is calibrated and nothing of it is saved; undone by ``undo()``."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Record, "start", interrupt)
    return monkeypatch


def test_the_command_goes_on_says_how_and_leaves_nothing_when_all_is_done(
    classifier_checkpoint: Path,
    tmp_path: Path,
    home: Path,
    capsys: pytest.CaptureFixture[str],
    interrupted: pytest.MonkeyPatch,
) -> None:
    folder, checkpoint = tmp_path / "work", tmp_path / "work" / "checkpoint"
    assert quantize(classifier_checkpoint, folder) == 130
    assert "Give the same command with --resume to go on." in capsys.readouterr().err
    parts = {path: path.stat().st_mtime_ns for path in checkpoint.glob("part-*")}
    assert len(parts) > 3
    interrupted.undo()
    interrupted.chdir(home)
    assert quantize(classifier_checkpoint, folder) == 1
    assert "go on with resume=True (--resume). To start anew, delete" in capsys.readouterr().err
    assert quantize(classifier_checkpoint, folder, "--resume", "-q", "steps=2") == 1
    assert "config.steps was 1 and is 2" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in checkpoint.glob("part-*")} == parts
    assert quantize(classifier_checkpoint, folder, "--resume") == 0
    assert not checkpoint.exists()
    assert quantize(classifier_checkpoint, tmp_path / "whole", "--checkpoint-dir", str(tmp_path / "elsewhere")) == 0
    assert not (tmp_path / "elsewhere").exists() and not (tmp_path / "whole" / "checkpoint").exists()
    found, wanted = tensors(folder), tensors(tmp_path / "whole")
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_folder_that_is_not_ours_stops_the_command_before_any_work(
    classifier_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photo.jpg").write_text("")
    assert quantize(classifier_checkpoint, tmp_path / "work", "--checkpoint-dir", str(tmp_path)) == 1
    assert "holds other files than a checkpoint's (photo.jpg" in capsys.readouterr().err


def loop(checkpoint: Path, folder: Path, **keys: Any) -> Runner:
    cfg = open_config(CLASSIFIER, FEW_ITEMS)
    cfg.work_dir, cfg.load_from, cfg.experiment_name = str(folder), str(checkpoint), f"{folder.name}-{len(keys)}"
    cfg.test_cfg = {"type": "RepAPQTestLoop", "quantizer": QUANTIZER, "calibration": {"num_samples": 16}, **keys}
    return Runner.from_cfg(cfg)


def test_the_test_loop_goes_on_where_its_config_says_so(
    classifier_checkpoint: Path, tmp_path: Path, home: Path, interrupted: pytest.MonkeyPatch
) -> None:
    kept = {"checkpoint_dir": str(tmp_path / "kept")}
    with pytest.raises(KeyboardInterrupt):
        loop(classifier_checkpoint, tmp_path / "one", **kept).test()
    interrupted.undo()
    interrupted.chdir(home)
    with pytest.raises(CheckpointError, match="finished parts .*resume=True"):
        loop(classifier_checkpoint, tmp_path / "two", **kept).test()
    metrics = loop(classifier_checkpoint, tmp_path / "three", **kept, resume=True).test()
    assert not (tmp_path / "kept").exists()
    assert loop(classifier_checkpoint, tmp_path / "four").test() == metrics
    found, wanted = tensors(tmp_path / "three"), tensors(tmp_path / "four")
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert not (tmp_path / "four" / "checkpoint").exists()


def own_host(network: nn.Module, images: list[Tensor], config: object, progress: object, options: object) -> None:
    """A host of a user's own, which knows nothing of checkpoints."""


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"resume": "yes"}, "resume='yes' is not allowed"),
        ({"checkpoint_dir": 3}, "checkpoint_dir=3 is not allowed"),
        ({"checkpoint_dir": ""}, "checkpoint_dir='' is not allowed"),
        ({"quantizer": {"type": f"{__name__}:own_host"}, "resume": True}, "resume=True is not allowed with quant"),
    ],
)
def test_values_that_make_no_sense_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings.from_values(**keys)


@pytest.mark.parametrize("host", ["NNCF", "PT2E", "TorchAO"])
def test_every_host_of_ours_keeps_checkpoints(host: str, tmp_path: Path) -> None:
    settings = Settings.from_values(quantizer={"type": host}, resume=True)
    assert type(settings.checkpoints(tmp_path)) is not Checkpoints
    assert (tmp_path / "checkpoint").is_dir()
