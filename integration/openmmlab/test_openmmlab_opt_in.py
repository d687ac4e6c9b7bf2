"""One line to opt in: by scoped name, by import, in a pure-Python config; and what mim and mmengine find of us."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.fileio import load
from mmengine.hub import get_config
from mmengine.registry import RUNNERS
from mmengine.utils import get_installed_path

import repapq_plugin.hosts.openmmlab as host
from integration.openmmlab.scenes import CLASSIFIER, DETECTOR, FEW_ITEMS, FEW_SCENES, ROOT
from integration.openmmlab.tools import run_tool
from repapq_plugin import RepAPQConfig
from repapq_plugin.cli.options import pairs
from repapq_plugin.errors import ConfigError
from repapq_plugin.hosts.openmmlab.scopes import register_scopes
from repapq_plugin.hosts.openmmlab.settings import settings_of
from repapq_plugin.hosts.openmmlab.workbench import open_config
from repapq_plugin.targets import Target

SCOPED = "repapq_plugin::_base_/repapq_w4a4.py"
PRESETS = {"w8a8": (8, 8), "w6a6": (6, 6), "w4a4": (4, 4), "mixed": (4, 8), "paper-w6a6": (6, 6)}


def _bits(cfg: Config) -> tuple[int, int]:
    quantizer = settings_of(cfg).quantizer
    return quantizer.weight_bits, quantizer.activation_bits


def test_a_scoped_base_with_the_unchanged_tool_started_by_our_module(
    classifier_checkpoint: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.py"
    config.write_text(f"_base_ = [{str(CLASSIFIER)!r}, {SCOPED!r}]\n")
    folder = tmp_path / "work"
    overrides = (*FEW_ITEMS, "repapq.quantizer.steps=0")
    record = run_tool(
        "mmpretrain", config, classifier_checkpoint, folder, *overrides, start=["-m", "repapq_plugin.hosts.openmmlab"]
    )
    assert record["scheme"].startswith("W4A4")
    assert 0 <= record["scores"]["repapq"]["accuracy/top1"] <= 100
    assert sum(merge["merged"] for merge in record["calibration"]["merges"]) == 13


def test_an_import_line_with_the_unchanged_tool(detector_checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text(f"_base_ = {str(DETECTOR)!r}\nfrom repapq_plugin.configs.mixed import *\n")
    overrides = (*FEW_SCENES, "repapq.quantizer.steps=0")
    record = run_tool("mmyolo", config, detector_checkpoint, tmp_path / "work", *overrides)
    assert record["scheme"].startswith("W4A8")
    assert "coco/bbox_mAP" in record["scores"]["repapq"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_in_every_spelling(preset: str, tmp_path: Path) -> None:
    beside = str(CLASSIFIER)
    spellings = {
        "scoped": f"_base_ = [{beside!r}, 'repapq_plugin::_base_/repapq_{preset}.py']\n",
        "imported": f"_base_ = {beside!r}\nfrom repapq_plugin.configs.{preset.replace('-', '_')} import *\n",
        "inherited and changed": f"_base_ = [{beside!r}, 'repapq_plugin::_base_/repapq_{preset}.py']\n"
        "repapq = dict(quantizer=dict(steps=7))\n",
    }
    for name, text in spellings.items():
        config = tmp_path / "config.py"
        config.write_text(text)
        cfg = open_config(config)
        assert _bits(cfg) == PRESETS[preset], name
        assert RUNNERS.get(cfg.runner_type) is host.RepAPQRunner
        assert cfg.model.backbone.type == "RepVGG"
    assert settings_of(cfg).quantizer.steps == 7


def test_a_preset_of_the_paper_is_passed_on_as_it_is(tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text(f"_base_ = {str(CLASSIFIER)!r}\nfrom repapq_plugin.configs.paper_w6a6 import *\n")
    paper = RepAPQConfig.from_preset("paper-w6a6")
    assert paper != RepAPQConfig.from_preset("w6a6")
    assert settings_of(open_config(config)).quantizer == paper
    plain = open_config(CLASSIFIER)
    assert settings_of(plain, quantizer={"preset": "paper-w6a6"}).quantizer == paper


def test_a_target_is_named_in_a_config_and_overridden_on_the_command_line(tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    base = f"_base_ = [{str(CLASSIFIER)!r}, 'repapq_plugin::_base_/repapq_w6a6.py']\n"
    config.write_text(base + "repapq = dict(quantizer=dict(target='tensorrt'))\n")
    cfg = open_config(config)
    quantizer = settings_of(cfg).quantizer
    assert (quantizer.target, quantizer.activation_bits) == ("tensorrt", 6)
    assert settings_of(cfg, quantizer=pairs(["target=litert"], "-q")).quantizer.target == "litert"
    own = settings_of(cfg, quantizer={"target": {"name": "own", "weights_per_channel": False}}).quantizer.runs_on
    assert own == Target("own", weights_per_channel=False)
    with pytest.raises(ConfigError, match="target='tensort'.*Did you mean 'tensorrt'"):
        settings_of(cfg, quantizer={"target": "tensort"})


def test_a_pure_python_config_imports_it_among_its_bases(tmp_path: Path) -> None:
    (tmp_path / "runtime.py").write_text("default_scope = 'mmpretrain'\n")
    config = tmp_path / "config.py"
    config.write_text(
        "from mmengine.config import read_base\n\n"
        "with read_base():\n"
        "    from .runtime import *\n"
        "    from repapq_plugin.configs.w6a6 import *\n\n"
        "repapq.update(backend='onnxruntime')\n"
    )
    cfg = Config.fromfile(str(config))
    assert _bits(cfg) == (6, 6)
    assert settings_of(cfg).backend == "onnxruntime"
    assert cfg.default_scope == "mmpretrain"


def test_get_config_and_mim_find_every_ready_config() -> None:
    folder = Path(get_installed_path("repapq_plugin")) / ".mim"
    index = load(folder / "model-index.yml")
    listed = [model for file in index["Import"] for model in load(folder / file)["Models"]]
    ready = {path for path in (folder / "configs").glob("mm*/repapq_*.py")}
    trained = {path for path in (folder / "configs").glob("mimicnorm/*.py") if "fashion" not in path.stem}
    assert ready and trained
    assert {folder / model["Config"] for model in listed} == ready | trained
    assert [model["Name"] for model in listed] == [Path(model["Config"]).stem for model in listed]
    cfg = get_config("repapq_plugin::mmyolo/repapq_yolov6-n_w8a8_coco.py")
    assert cfg.model.type == "YOLODetector"
    assert _bits(cfg) == (8, 8)


def test_names_of_a_toolbox_under_another_distribution_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULE2PACKAGE, "mmseg", "a-distribution-that-is-not-installed")
    monkeypatch.setitem(MODULE2PACKAGE, "mmnothing", "another-one")
    register_scopes()
    assert MODULE2PACKAGE["mmseg"] == "mmseg"
    assert MODULE2PACKAGE["mmnothing"] == "another-one"
    assert MODULE2PACKAGE["mmdet"] == "mmdet"
    assert get_config("mmseg::fcn/fcn_r50-d8_4xb4-160k_ade20k-512x512.py").model.type == "EncoderDecoder"


@pytest.mark.parametrize(("words", "message"), [([], "usage: "), (["nowhere.py"], "nowhere.py is not a file")])
def test_our_module_says_what_it_wants(words: list[str], message: str, tmp_path: Path) -> None:
    command: list[Any] = [sys.executable, "-m", "repapq_plugin.hosts.openmmlab", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
