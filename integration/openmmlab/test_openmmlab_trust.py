"""Checkpoints of strangers: what mmengine writes is read, all else is refused by name, and nothing in a file is run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.runner import Runner
from torch import Tensor

from integration.openmmlab.lines import LineModel
from integration.openmmlab.scenes import CLASSIFIER, FEW_ITEMS, options
from integration.openmmlab.tools import start_tool
from repapq_plugin.cli import main
from repapq_plugin.errors import ConfigError, HostError
from repapq_plugin.hosts.openmmlab import RepAPQRunner
from repapq_plugin.hosts.openmmlab.checkpoint import load_weights
from repapq_plugin.hosts.openmmlab.settings import Settings, settings_of
from repapq_plugin.hosts.openmmlab.workbench import open_config
from tests.support.hostile import HOSTILE, PLACES, write_hostile

KINDS = tuple(HOSTILE)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_runs_unless_the_file_is_trusted(kind: str, place: str, zipped: bool, tmp_path: Path) -> None:
    marker, model = tmp_path / "marker", LineModel()
    path = str(write_hostile(tmp_path / "a.pth", model.state_dict(), kind, marker, place, zipped))
    with pytest.raises(HostError) as raised:
        load_weights(model, path)
    assert HOSTILE[kind][1] in str(raised.value)
    assert "a.pth" in str(raised.value) and "--trust-checkpoint" in str(raised.value)
    assert not marker.exists()
    load_weights(model, path, trusted=True)
    assert marker.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_an_address_runs_nothing_either(kind: str, tmp_path: Path, address: str) -> None:
    marker = tmp_path / "marker"
    write_hostile(tmp_path / "a.pth", LineModel().state_dict(), kind, marker)
    with pytest.raises(HostError, match="a.pth holds"):
        load_weights(LineModel(), address + "a.pth")
    assert not marker.exists()


def test_what_calls_only_what_mmengine_holds_for_safe_runs_there(tmp_path: Path) -> None:
    """Why nothing of that list is taken over: no warning, no fallback, and yet the marker is there."""
    from mmengine.runner.checkpoint import get_torch_safe_globals

    marker = tmp_path / "marker"
    path = write_hostile(tmp_path / "a.pth", {}, "lookup", marker)
    with torch.serialization.safe_globals([*get_torch_safe_globals(), HistoryBuffer]):
        torch.load(path, weights_only=True)
    assert marker.exists()


@pytest.fixture(scope="module")
def weights(classifier_checkpoint: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(classifier_checkpoint)["state_dict"]
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_refuses_and_writes_nothing(
    kind: str, weights: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"
    path = write_hostile(tmp_path / "evil.pth", weights, kind, marker)
    words = ["quantize", str(CLASSIFIER), str(path), "-w", str(tmp_path / "work"), *options(FEW_ITEMS)]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert f"evil.pth holds {HOSTILE[kind][1]}" in error and "--trust-checkpoint" in error
    assert not marker.exists() and not list(tmp_path.rglob("*.safetensors"))


def test_the_command_trusts_where_it_is_told_to(weights: dict[str, Tensor], tmp_path: Path) -> None:
    marker, folder = tmp_path / "marker", tmp_path / "work"
    path = write_hostile(tmp_path / "evil.pth", weights, "shell", marker)
    words = ["quantize", str(CLASSIFIER), str(path), "-w", str(folder), "--trust-checkpoint", "--no-compare"]
    assert main([*words, "--export", "none", "-q", "steps=0", *options(FEW_ITEMS)]) == 0
    assert marker.exists() and (folder / "repapq.safetensors").is_file()


def opted_in(form: str, checkpoint: Path, folder: Path, **keys: object) -> Config:
    cfg = open_config(CLASSIFIER, FEW_ITEMS)
    cfg.work_dir, cfg.load_from, cfg.experiment_name = str(folder), str(checkpoint), folder.name
    said = {"quantizer": {"preset": "w8a8", "steps": 0}, "calibration": {"num_samples": 16}, **keys}
    if form == "loop":
        cfg.test_cfg = {"type": "RepAPQTestLoop", **said}
    else:
        cfg.repapq = said
    return cfg


RUNNERS = {"loop": Runner, "runner": RepAPQRunner}


@pytest.mark.parametrize("form", RUNNERS)
@pytest.mark.parametrize("kind", ["shell", "setstate", "array", "lookup"])
def test_the_test_loop_refuses(form: str, kind: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = write_hostile(tmp_path / "evil.pth", weights, kind, marker)
    runner = RUNNERS[form].from_cfg(opted_in(form, path, tmp_path / f"refused_{form}_{kind}"))
    with pytest.raises(HostError, match=r"evil\.pth holds .*trust_checkpoint=True"):
        runner.test()
    assert not marker.exists()


@pytest.mark.parametrize("form", RUNNERS)
def test_the_test_loop_trusts_where_the_config_says_so(form: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = write_hostile(tmp_path / "evil.pth", weights, "setstate", marker)
    cfg = opted_in(form, path, tmp_path / f"trusted_{form}", trust_checkpoint=True)
    RUNNERS[form].from_cfg(cfg).test()
    assert marker.exists()


@pytest.mark.parametrize("action", ["val", "train"])
def test_the_runner_refuses_in_validation_and_training_too(
    action: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    path = write_hostile(tmp_path / "evil.pth", weights, "shell", marker)
    runner = RepAPQRunner.from_cfg(opted_in("runner", path, tmp_path / f"refused_{action}"))
    with pytest.raises(HostError, match=r"evil\.pth holds posix\.system"):
        runner.load_or_resume()
    runner._resume = True
    with pytest.raises(HostError, match=r"evil\.pth holds posix\.system"):
        runner.load_or_resume()
    assert not marker.exists()


FORMS = {
    "one more base": "_base_ = [{config!r}, 'repapq_plugin::_base_/repapq_w8a8.py']\n",
    "one more line": "_base_ = {config!r}\nfrom repapq_plugin.configs.w8a8 import *\n",
    "loop by name": "_base_ = {config!r}\n"
    "custom_imports = dict(\n"
    "    imports=['integration.fashion', 'repapq_plugin.hosts.openmmlab'], allow_failed_imports=False)\n"
    "custom_hooks = [dict(type='QPRFusionHook')]\n"
    "test_cfg = dict(_delete_=True, type='RepAPQTestLoop', quantizer=dict(preset='w8a8', steps=0))\n",
}


def tool_on(form: str, checkpoint: Path, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    config = folder / "config.py"
    config.write_text(FORMS[form].format(config=str(CLASSIFIER)))
    start = ["-m", "repapq_plugin.hosts.openmmlab"] if "::" in FORMS[form] else []
    return start_tool("mmpretrain", config, checkpoint, folder / "work", *FEW_ITEMS, *overrides, start=start)


@pytest.mark.parametrize("form", FORMS)
def test_the_unchanged_tool_refuses_in_every_documented_form(
    form: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    path = write_hostile(tmp_path / "evil.pth", weights, "shell", marker)
    done = tool_on(form, path, tmp_path)
    assert done.returncode != 0
    assert "evil.pth holds posix.system" in done.stderr
    assert not marker.exists()


def test_the_unchanged_tool_trusts_where_it_is_told_to(weights: dict[str, Tensor], tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = write_hostile(tmp_path / "evil.pth", weights, "shell", marker)
    done = tool_on("one more line", path, tmp_path, "repapq.trust_checkpoint=True", "repapq.quantizer.steps=0")
    assert done.returncode == 0, done.stderr[-2000:]
    assert marker.exists()


def test_the_key_is_true_or_false() -> None:
    assert not Settings().trust_checkpoint
    assert settings_of({"repapq": {"trust_checkpoint": True}}).trust_checkpoint
    with pytest.raises(ConfigError, match="trust_checkpoint='yes' is not allowed; choose True or False"):
        settings_of({"repapq": {"trust_checkpoint": "yes"}})


@pytest.mark.parametrize("command", ["eval", "export"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_state_of_nncf_s_runs_nothing(
    kind: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"
    path = write_hostile(tmp_path / "nncf.pth", {}, kind, marker)
    assert main([command, str(CLASSIFIER), str(path), "-w", str(tmp_path / "work"), *options(FEW_ITEMS)]) == 1
    assert "nncf.pth holds" in capsys.readouterr().err
    assert not marker.exists()
