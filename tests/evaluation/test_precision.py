"""What a network ran in is what was asked for, or what the runtime says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from repapq_plugin.evaluation import OpenVINONetwork
from repapq_plugin.export import export_openvino


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("precision") / "net.xml"
    export_openvino(nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8), path)
    return path


def test_the_precision_asked_for_is_the_one_that_is_said(file: Path) -> None:
    assert OpenVINONetwork(file, precision="f32").precision == "f32"
    assert OpenVINONetwork(file, precision=None).precision in ("f32", "bf16", "f16")
