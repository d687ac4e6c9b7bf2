"""Every example runs as a user would run it, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SAYS = {
    "any_module": "merged: ['1', '2']",
    "nncf_quantize": "OpenVINO and torch differ by at most 0.0",
    "torch_ao_fx": "QuantizedLinear(",
    "pt2e_export": "integer weights: [",
    "own_block": "2: relative error of the merge",
    "own_observer": "activations per tensor affine unsigned (deviation)",
}
"""What an example prints, if it did what it is there for."""

CONFIG = HERE / "openmmlab_config.py"
SCRIPTS = sorted(path for path in HERE.glob("*.py") if path.stem in SAYS)


def run(*words: str, folder: Path) -> str:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_run() -> None:
    others = {"__init__", "test_examples", CONFIG.stem}
    assert {path.stem for path in HERE.glob("*.py")} == {*SAYS, *others}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_runs_and_shows_what_it_is_there_for(script: Path, tmp_path: Path) -> None:
    assert SAYS[script.stem] in run(str(script), folder=tmp_path)


def test_the_config_quantizes_by_the_command(tmp_path: Path) -> None:
    said = run("-m", "repapq_plugin", "quantize", str(CONFIG), "-w", str(tmp_path / "out"), folder=tmp_path)
    assert "W6A6" in said
    assert (tmp_path / "out" / "repapq.onnx").exists()
    assert (tmp_path / "out" / "result.json").exists()
