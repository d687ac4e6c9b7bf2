"""Pairs are repeated in front of what only moves values, and no value changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from repapq_plugin import CalibrationResult, RepAPQConfig, export_onnx, export_openvino, quantize_model
from repapq_plugin.targets import TARGETS, Target
from tests.support.networks import batches


class Moves(nn.Module):
    """Layers between which values are pooled, joined, resized and reshaped; ``again`` reads a tensor on its own."""

    def __init__(self, mode: str = "nearest") -> None:
        super().__init__()
        self.mode = mode
        self.first = nn.Conv2d(3, 8, 3, 1, 1)
        self.second = nn.Conv2d(8, 8, 1)
        self.joined = nn.Conv2d(24, 8, 1)
        self.fc = nn.Linear(8 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(self.first(x).relu(), 2)
        pooled = functional.max_pool2d(x, 3, 1, 1)
        small = functional.max_pool2d(self.second(x).relu(), 2)
        x = torch.cat(
            [pooled, functional.max_pool2d(pooled, 3, 1, 1), functional.interpolate(small, scale_factor=2)], 1
        )
        return self.fc(functional.interpolate(self.joined(x), scale_factor=1.0, mode=self.mode).flatten(1))


def quantized(target: str | Target, bits: int, mode: str = "nearest") -> tuple[CalibrationResult, Tensor]:
    torch.manual_seed(0)
    data = batches(2)
    config = RepAPQConfig.from_preset(f"w8a{bits}", target=target, steps=0)
    return quantize_model(Moves(mode).eval(), data, config), data[0]


def run(path: Path, x: Tensor) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def sources(path: Path, kind: str) -> list[set[str]]:
    """Return by which operators the inputs of each node of a kind are made."""
    graph = onnx.load(path).graph
    made = {name: node.op_type for node in graph.node for name in node.output}
    return [{made[name] for name in node.input if name in made} for node in graph.node if node.op_type == kind]


@pytest.mark.parametrize("bits", [8, 6])
def test_values_stay_and_movers_read_integers(bits: int, tmp_path: Path) -> None:
    files = []
    for target in ("generic", "openvino"):
        result, x = quantized(target, bits)
        files.append(export_onnx(result, x, tmp_path / f"{target}.onnx").path)
    plain, moved = files
    assert np.array_equal(run(plain, x), run(moved, x))
    # The first pooling is read on two grids, none of which may be repeated in front of it.
    assert sources(moved, "MaxPool") == [{"Relu"}, *[{"DequantizeLinear"}] * 3]
    for kind in ("Concat", "Flatten"):
        assert sources(moved, kind) == [{"DequantizeLinear"}]
    assert {"DequantizeLinear"} not in sources(plain, "Flatten")


def test_only_operators_that_the_target_names_are_meant(tmp_path: Path) -> None:
    target = dataclasses.replace(TARGETS["openvino"], name="pools", quantized_operators=("MaxPool",))
    result, x = quantized(target, 8)
    path = export_onnx(result, x, tmp_path / "model.onnx").path
    assert sources(path, "Flatten") != [{"DequantizeLinear"}]
    path = export_onnx(result.model, x, tmp_path / "named.onnx", target=TARGETS["openvino"]).path
    assert sources(path, "Flatten") == [{"DequantizeLinear"}]


def test_a_resize_that_makes_new_values_keeps_its_floats(tmp_path: Path) -> None:
    result, x = quantized("openvino", 8, "bilinear")
    path = export_onnx(result, x, tmp_path / "model.onnx").path
    assert sources(path, "Resize") == [{"DequantizeLinear"}, {"Conv"}]  # the first one takes the nearest


def test_openvino_reads_the_same_form(tmp_path: Path) -> None:
    outputs = []
    for target in ("generic", "openvino"):
        result, x = quantized(target, 7)
        summary = export_openvino(result, x, tmp_path / f"{target}.xml")
        assert summary.max_rel_difference is not None and summary.max_rel_difference < 1e-2
        outputs.append(summary.integer_layers)
    assert outputs == [4, 4]
