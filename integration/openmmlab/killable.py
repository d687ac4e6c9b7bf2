"""A small classifier quantized by `RepAPQTestLoop`, for processes that are killed."""

from __future__ import annotations

import os
from pathlib import Path

from mmengine.runner import Runner

from integration.openmmlab.scenes import CLASSIFIER, FEW_ITEMS, random_checkpoint
from repapq_plugin.hosts.openmmlab import RepAPQTestLoop
from repapq_plugin.hosts.openmmlab.workbench import open_config
from repapq_plugin.result import Calibrated
from tests.support.killing import small_config


def classifier(folder: Path, schedule: str) -> Calibrated:
    """Quantize and score a classifier; see `tests.support.killing.Entry`."""
    os.chdir(folder)
    config = folder / "small.py"
    blocks = "model = dict(backbone=dict(arch=dict(num_blocks=[1, 1, 1, 1])))"
    config.write_text(f"_base_ = {str(CLASSIFIER)!r}\n{blocks}\n")
    cfg = open_config(config, FEW_ITEMS)
    cfg.load_from = str(random_checkpoint(config, folder / "float.pth"))
    cfg.work_dir = str(folder)
    cfg.experiment_name = f"killable-{os.getpid()}"
    quantizer, calibration = small_config(schedule).to_dict(), {"num_samples": 16}
    cfg.test_cfg = {"type": "RepAPQTestLoop", "quantizer": quantizer, "calibration": calibration, "resume": True}
    runner = Runner.from_cfg(cfg)
    runner.test()
    loop = runner.test_loop
    assert isinstance(loop, RepAPQTestLoop) and loop.result is not None
    return loop.result
