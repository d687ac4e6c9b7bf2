"""Quantize any nn.Module: its branches are merged, then it learns from the float network."""

import tempfile
from pathlib import Path

import torch
from torch import nn

from repapq_plugin import CalibrationResult, RepAPQConfig, export_onnx, quantize_model


class Block(nn.Module):
    """Two branches and a shortcut, in a class that the plugin has never seen."""

    def __init__(self, width):
        super().__init__()
        self.large = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.small = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        return torch.relu(self.large(x) + self.small(x) + x)


torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), Block(8), Block(8), nn.Flatten(), nn.Linear(8 * 64, 10)).eval()
batches = [torch.randn(8, 3, 16, 16) for _ in range(4)]

result = quantize_model(model, batches, RepAPQConfig.from_preset("w6a6", steps=5))
print("merged:", [record.name for record in result.merges])
print("quantized:", list(result.plan.layers))
difference = (result.model(batches[0]) - model(batches[0])).abs().mean()
print(f"mean difference from float: {difference:.4f}")

with tempfile.TemporaryDirectory() as folder:
    result.save(Path(folder) / "repapq.safetensors")
    loaded = CalibrationResult.load(Path(folder) / "repapq.safetensors", model)
    assert torch.equal(loaded.model(batches[0]), result.model(batches[0]))
    export_onnx(result, batches[0], Path(folder) / "repapq.onnx")
