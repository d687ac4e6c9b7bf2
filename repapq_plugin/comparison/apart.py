"""A calibration in a process of its own, brought back from there."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from repapq_plugin.comparison.child import MEASURED, RESULT, SUBJECT, UNREADABLE
from repapq_plugin.config import RepAPQConfig
from repapq_plugin.errors import CalibrationError
from repapq_plugin.job import quantize_model
from repapq_plugin.result import CalibrationResult

TOLD = 600
"""How many of the last characters an error quotes of what a process wrote."""


@dataclass(frozen=True)
class Calibration:
    """A calibrated network and what it took.

    Args:
        result: The network.
        cpu_seconds: Processor time, all threads together.
        peak_bytes: Largest resident memory of the process; ``None``: not measured.
        note: Why something was not measured.
    """

    result: CalibrationResult
    cpu_seconds: float
    peak_bytes: int | None
    note: str = ""


def calibrate_apart(model: nn.Module, batches: Sequence[Tensor], config: RepAPQConfig, folder: Path) -> Calibration:
    """Quantize a copy of ``model`` in a process of its own.

    Where the model cannot be pickled, or not be unpickled elsewhere, this process does it, and no memory is told.

    Args:
        model: The float network.
        batches: Calibration batches.
        config: The method.
        folder: A private folder; takes ``repapq.safetensors``.

    Raises:
        CalibrationError: The calibration failed, or its process was ended.
    """
    try:
        subject = {"model": model, "batches": list(batches), "config": config, "threads": torch.get_num_threads()}
        torch.save(subject, folder / SUBJECT)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
        return _calibrate_here(model, batches, config, folder, str(error))
    # What this process can import, that one can.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
    command = [sys.executable, "-m", "repapq_plugin.comparison.child", str(folder)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    finally:
        (folder / SUBJECT).unlink()
    if done.returncode == UNREADABLE:
        return _calibrate_here(model, batches, config, folder, done.stderr.strip().splitlines()[-1])
    if done.returncode or not (folder / MEASURED).is_file():
        raise CalibrationError(
            f"The process of the calibration {ended(done.returncode)}: {done.stderr[-TOLD:].strip()}"
        )
    measured = json.loads((folder / MEASURED).read_text())
    if "error" in measured:
        raise CalibrationError(measured["error"])
    result = CalibrationResult.load(folder / RESULT, model)
    return Calibration(result, measured["cpu_seconds"], measured["peak_bytes"])


def ended(code: int) -> str:
    """Say how a process ended."""
    return (
        f"was ended by signal {-code} (9 is what a system sends that runs out of memory)"
        if code < 0
        else (f"ended with code {code}")
    )


def _calibrate_here(
    model: nn.Module, batches: Sequence[Tensor], config: RepAPQConfig, folder: Path, why: str
) -> Calibration:
    started = time.process_time()
    result = quantize_model(model, batches, config)
    seconds = time.process_time() - started
    result.save(folder / RESULT)
    return Calibration(result, seconds, None, f"no memory told: the model cannot go to a process of its own ({why})")
