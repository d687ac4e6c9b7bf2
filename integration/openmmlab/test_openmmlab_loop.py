from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.registry import HOOKS, LOOPS, MODELS, RUNNERS
from mmengine.runner import Runner

import repapq_plugin.hosts.openmmlab as host
from integration.openmmlab.scenes import CONFIGS, DETECTOR, FEW_SCENES
from repapq_plugin import MAEObserver
from repapq_plugin.errors import ConfigError, HostError
from repapq_plugin.hosts.openmmlab.workbench import open_config
from repapq_plugin.quantizers.layers import QuantizedLayer
from repapq_plugin.reparam.merge import MergedBlock


def _config(checkpoint: Path, folder: Path, **test_cfg: Any) -> Config:
    """The detector's own config, EMA hook and all, with our loop and hook by name."""
    cfg = open_config(DETECTOR, FEW_SCENES)
    cfg.work_dir, cfg.load_from = str(folder), str(checkpoint)
    cfg.experiment_name = folder.name
    if test_cfg:
        cfg.test_cfg = {"type": "RepAPQTestLoop", "calibration": {"num_samples": 16}, **test_cfg}
    cfg.custom_hooks = [*cfg.custom_hooks, {"type": "QPRFusionHook"}]
    return cfg


def test_everything_has_a_name_in_the_root_registries() -> None:
    host.register()
    host.register()
    assert HOOKS.get("QPRFusionHook") is host.QPRFusionHook
    assert LOOPS.get("RepAPQTestLoop") is host.RepAPQTestLoop
    assert RUNNERS.get("RepAPQRunner") is host.RepAPQRunner
    assert MODELS.get("MAEObserver") is MAEObserver
    assert MODELS.get("LearnableFakeQuantize") is not None


def test_the_loop_quantizes_once_and_leaves_its_files(detector_checkpoint: Path, tmp_path: Path) -> None:
    cfg = _config(detector_checkpoint, tmp_path / "loop", quantizer={"preset": "w6a6", "steps": 1})
    runner = Runner.from_cfg(cfg)
    assert any(isinstance(hook, EMAHook) for hook in runner.hooks)
    metrics = runner.test()
    assert not any(isinstance(hook, EMAHook) for hook in runner.hooks)
    quantized = runner.model
    assert sum(isinstance(module, QuantizedLayer) for module in quantized.modules()) > 30
    record = json.loads((tmp_path / "loop" / "result.json").read_text())
    assert record["scores"]["repapq"] == pytest.approx(metrics)
    assert record["scheme"].startswith("W6A6")
    assert record["calibration"]["units"]
    assert (tmp_path / "loop" / "repapq.safetensors").stat().st_size > 100_000
    scalars, images = _visualized(tmp_path / "loop")
    assert scalars["repapq/coco/bbox_mAP"] == [(0, pytest.approx(metrics["coco/bbox_mAP"]))]
    units = record["calibration"]["units"]
    for when in ("before", "after"):
        losses = [(step, unit[f"loss_{when}"]) for step, unit in enumerate(units) if unit[f"loss_{when}"] is not None]
        assert scalars[f"repapq/loss_{when}"] == losses
    assert {"repapq_losses", "repapq_activations", "repapq_outliers"} == {"_".join(n.split("_")[:2]) for n in images}
    assert runner.test() == pytest.approx(metrics)
    assert runner.model is quantized
    assert _visualized(tmp_path / "loop")[0].keys() == scalars.keys()


def _visualized(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], list[str]]:
    """What the toolbox's own backend wrote: values and steps by name, and images."""
    scalars: dict[str, list[tuple[int, float]]] = {}
    for file in folder.rglob("vis_data/scalars.json"):
        for line in map(json.loads, file.read_text().splitlines()):
            for name in line.keys() - {"step"}:
                scalars.setdefault(name, []).append((line["step"], line[name]))
    return scalars, sorted(path.stem for path in folder.rglob("vis_image/repapq*.png"))


def test_the_hook_merges_for_tests_only_and_keeps_the_score(detector_checkpoint: Path, tmp_path: Path) -> None:
    cfg = _config(detector_checkpoint, tmp_path / "hook")
    cfg.custom_hooks = []
    branched = Runner.from_cfg(cfg).test()
    cfg = _config(detector_checkpoint, tmp_path / "merged")
    runner = Runner.from_cfg(cfg)
    hook = next(hook for hook in runner.hooks if isinstance(hook, host.QPRFusionHook))
    hook.before_train(runner)
    hook.before_val(runner)
    assert not any(isinstance(module, MergedBlock) for module in runner.model.modules())
    hook.after_train(runner)
    merged = runner.test()
    blocks = sum(isinstance(module, MergedBlock) for module in runner.model.modules())
    assert blocks > 10
    assert merged == pytest.approx(branched, abs=2e-3)
    hook.before_val(runner)
    assert sum(isinstance(module, MergedBlock) for module in runner.model.modules()) == blocks


def test_a_base_file_is_all_that_a_config_needs(tmp_path: Path) -> None:
    config = tmp_path / "mine.py"
    bases = [str(DETECTOR), str(CONFIGS.parent / "_base_" / "repapq_w4a4.py")]
    config.write_text(f"_base_ = {bases!r}\n")
    cfg = open_config(config, FEW_SCENES)
    cfg.work_dir = str(tmp_path / "work")
    runner = RUNNERS.build(cfg)
    assert isinstance(runner, host.RepAPQRunner)
    loop = runner.test_loop
    assert isinstance(loop, host.RepAPQTestLoop)
    assert loop.settings.quantizer.weight_bits == 4
    assert any(isinstance(hook, host.QPRFusionHook) for hook in runner.hooks)


def test_bad_keys_are_named_before_any_work(detector_checkpoint: Path, tmp_path: Path) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"quantizer": {"weight_bits": 9}}, "weight_bits=9"),
        ({"quantizer": {"bits": 4}}, "bits is not a key"),
        ({"calibration": {"samples": 4}}, "calibration.samples is not a key"),
        ({"calibration": {"num_samples": 0}}, "num_samples=0"),
        ({"backend": "tensorrt"}, "backend='tensorrt'"),
        ({"export": ["engine"]}, "export='engine'"),
    ]
    cfg = _config(detector_checkpoint, tmp_path / "bad", quantizer={"preset": "w8a8"})
    runner = Runner.from_cfg(cfg)
    for keys, message in bad:
        with pytest.raises(ConfigError, match=message):
            host.RepAPQTestLoop(runner, cfg.test_dataloader, cfg.test_evaluator, **keys)
    cfg.repapq = {"quantiser": {}}
    with pytest.raises(ConfigError, match="repapq.quantiser is not a key"):
        host.RepAPQRunner.from_cfg(cfg)


def test_a_checkpoint_of_another_model_stops_the_test(classifier_checkpoint: Path, tmp_path: Path) -> None:
    cfg = _config(classifier_checkpoint, tmp_path / "other", quantizer={"preset": "w8a8", "steps": 0})
    with pytest.raises(HostError, match=r"does not fit YOLODetector: \d+ keys missing"):
        Runner.from_cfg(cfg).test()
