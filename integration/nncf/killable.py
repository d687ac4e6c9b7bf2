"""A small calibration by the plugin's `quantize` for NNCF, for processes that are killed."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import nncf
import torch

from repapq_plugin.hosts.nncf import quantize_with_record
from repapq_plugin.result import Calibrated
from tests.support.killing import SEED_OF_DATA, SEED_OF_NETWORK, small_config
from tests.support.networks import Chain, settle

os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")
nncf.set_log_level(logging.ERROR)


def chain(folder: Path, schedule: str) -> Calibrated:
    """Calibrate a small chain; see `tests.support.killing.Entry`."""
    torch.manual_seed(SEED_OF_NETWORK)
    model = settle(Chain(widths=(8, 12)))
    torch.manual_seed(SEED_OF_DATA)
    data = nncf.Dataset([torch.randn(8, 3, 16, 16) for _ in range(16)])
    return quantize_with_record(
        model, data, repapq=small_config(schedule), checkpoint_dir=folder / "checkpoint", resume=True
    )
