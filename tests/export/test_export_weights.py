"""What a forward of one's own does with a weight on the way to its product."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from repapq_plugin import RepAPQConfig, export_onnx, quantize_model
from tests.support.own_layers import StandardizedLinear


def test_a_matrix_that_is_flattened_to_a_matrix_is_an_integer_weight(tmp_path: Path) -> None:
    model = nn.Sequential(StandardizedLinear(3, 5), nn.ReLU(), StandardizedLinear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    batches = [torch.randn(4, 3) for _ in range(2)]
    result = quantize_model(model.eval(), batches, RepAPQConfig(steps=0))
    summary = export_onnx(result, batches[0], tmp_path / "network.onnx")
    assert summary.integer_layers == 3 and "Flatten" not in summary.operators
    assert summary.max_rel_difference is not None and summary.max_rel_difference < 1e-5
