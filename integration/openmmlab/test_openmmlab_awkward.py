"""Checkpoints with averaged weights, configs that merge branches themselves, batches of images of differing size."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.runner import Runner

from integration.openmmlab.scenes import CLASSIFIER, DETECTOR, FEW_SCENES, random_model
from repapq_plugin import CalibrationResult, RepAPQConfig
from repapq_plugin.hosts.openmmlab.checkpoint import load_weights
from repapq_plugin.hosts.openmmlab.network import run_batch
from repapq_plugin.hosts.openmmlab.work import RESULT_FILE, calibrate
from repapq_plugin.hosts.openmmlab.workbench import Workbench, open_config


def test_the_averaged_weights_of_an_ema_checkpoint_are_taken(tmp_path: Path) -> None:
    trained = random_model(CLASSIFIER)
    runner = SimpleNamespace(model=trained)
    hook = EMAHook(momentum=0.5, update_buffers=True)
    hook.before_run(runner)
    averaged = {key: value.clone() for key, value in trained.state_dict().items()}
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1.0)
    checkpoint = {"state_dict": trained.state_dict(), "meta": {}}
    hook.before_save_checkpoint(runner, checkpoint)
    torch.save(checkpoint, tmp_path / "ema.pth")
    model = random_model(CLASSIFIER)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_weights(model, str(tmp_path / "ema.pth"))
    assert "ema_state_dict" in checkpoint
    assert all(torch.equal(value, averaged[key]) for key, value in model.state_dict().items())


def _config_that_merges_by_itself(folder: Path, **keys: Any) -> Any:
    cfg = open_config(DETECTOR, FEW_SCENES)
    cfg.custom_hooks = [*cfg.custom_hooks, {"type": "mmyolo.SwitchToDeployHook"}]
    cfg.work_dir, cfg.experiment_name = str(folder), folder.name
    cfg.merge_from_dict(keys)
    return cfg


def test_a_config_with_mmyolo_s_own_deploy_hook_is_quantized_from_its_branches(
    detector_checkpoint: Path, tmp_path: Path
) -> None:
    test_cfg = {"type": "RepAPQTestLoop", "quantizer": {"preset": "w8a8", "steps": 0}}
    cfg = _config_that_merges_by_itself(tmp_path / "work", load_from=str(detector_checkpoint), test_cfg=test_cfg)
    runner = Runner.from_cfg(cfg)
    runner.test()
    result = runner.test_loop.result
    assert sum(merge.merged for merge in result.merges) > 10
    # What was saved fits the config's model, branches and all.
    fresh = random_model(DETECTOR)
    loaded = CalibrationResult.load(tmp_path / "work" / RESULT_FILE, fresh)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(loaded.model(image, mode="tensor"), runner.model(image, mode="tensor"), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_scoring_the_float_network_leaves_its_branches(detector_checkpoint: Path, tmp_path: Path) -> None:
    cfg = _config_that_merges_by_itself(tmp_path / "work")
    bench = Workbench(cfg, str(detector_checkpoint), tmp_path / "work")
    keys = list(bench.model.state_dict())
    bench.score(bench.model)
    assert list(bench.model.state_dict()) == keys


def test_one_process_quantizes_several_configs(detector_checkpoint: Path, tmp_path: Path) -> None:
    """mmengine keeps a visualizer by its name, and with it the folder it was made for."""
    for folder in (tmp_path / "first", tmp_path / "second"):
        bench = Workbench(open_config(DETECTOR, FEW_SCENES), str(detector_checkpoint), folder)
        assert "coco/bbox_mAP" in bench.score(bench.model)
        shutil.rmtree(folder)


@pytest.mark.parametrize("steps", [0, 2])
def test_images_of_differing_size_are_padded_by_the_toolbox_and_calibrate(steps: int) -> None:
    model = random_model(CLASSIFIER)
    sizes = [[(28, 28), (24, 32)], [(40, 28), (28, 28)]]
    batches = [
        {"inputs": [torch.randint(0, 256, (1, *size), dtype=torch.uint8) for size in batch], "data_samples": None}
        for batch in sizes
    ]
    result = calibrate(model, batches, RepAPQConfig(steps=steps))
    with torch.no_grad():
        for batch in batches:
            wanted, got = run_batch(model, batch), run_batch(result.model, batch)
            for a, b in zip(wanted, got, strict=True):
                assert a.shape == b.shape
                assert float((a - b).abs().mean() / a.abs().mean()) < 0.1
