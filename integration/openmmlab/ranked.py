"""What each of two processes does in the tests of launchers."""

from __future__ import annotations

import json
import os
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from integration.openmmlab.scenes import CLASSIFIER, FEW_ITEMS, options
from repapq_plugin.cli import main
from repapq_plugin.hosts.openmmlab import RepAPQTestLoop
from repapq_plugin.hosts.openmmlab.data import calibration_batches
from repapq_plugin.hosts.openmmlab.workbench import open_config

FEW_STEPS = {"preset": "w6a6", "steps": 2}


def by_command(rank: int, config: str, checkpoint: str, folder: str) -> int:
    """Run ``repapq quantize``; return its exit code."""
    os.chdir(Path(folder).parent)
    words = ["quantize", config, checkpoint, "-w", folder, "--preset", "w6a6", "-q", "steps=2", "--no-compare"]
    words += ["--calib-samples", "16", "--export", "onnx", *options(FEW_ITEMS)]
    return main([*words, "--launcher", "pytorch" if os.environ.get("RANK") else "none"])


def by_loop(rank: int, config: str, checkpoint: str, folder: str, samples: int) -> dict[str, object]:
    """Test by `RepAPQRunner`; return the score, and how many batches this rank calibrates on."""
    os.chdir(Path(folder).parent)
    cfg = open_config(config, FEW_ITEMS)
    cfg.load_from, cfg.work_dir, cfg.launcher = checkpoint, folder, "pytorch" if os.environ.get("RANK") else "none"
    cfg.experiment_name = f"ranked-{os.getpid()}"
    cfg.runner_type = "RepAPQRunner"
    cfg.repapq = {"quantizer": FEW_STEPS, "calibration": {"num_samples": samples}}
    runner: Runner = RUNNERS.build(cfg)
    metrics = runner.test()
    loop = runner.test_loop
    assert isinstance(loop, RepAPQTestLoop) and loop.result is not None
    shared = calibration_batches(cfg, None, samples, seed=0)
    return {
        "metrics": metrics,
        "numbers": {key: value.clone() for key, value in loop.result.model.state_dict().items()},
        "batches": [len(batch["inputs"]) for batch in shared],  # type: ignore[index]
        "notes": loop.result.notes,
    }


def small_config(folder: Path) -> Path:
    """Write the config of a classifier with few blocks."""
    config = folder / "small.py"
    config.write_text(
        f"_base_ = {str(CLASSIFIER)!r}\nmodel = dict(backbone=dict(arch=dict(num_blocks=[1, 1, 1, 1])))\n"
    )
    assert Config.fromfile(str(config)).model
    return config


def record_in(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return what stands in ``result.json``."""
    found: dict[str, dict[str, dict[str, float]]] = json.loads((folder / "result.json").read_text())
    return found
