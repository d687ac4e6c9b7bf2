"""The rules of targets on files that other tools made: what onnxruntime's and NNCF's own quantizers write.

Findings are asserted as they are. onnxruntime's defaults break TensorRT's rules, and the options that its users are
told to set mend that; NNCF gives the network's input int8 and what follows a ReLU uint8.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor, nn

from repapq_plugin import export_onnx
from repapq_plugin.export.check import check_onnx
from repapq_plugin.targets import TARGETS
from tests.support.networks import batches, settle


class Residual(nn.Module):
    """A residual block, pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.first, self.second = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.second(self.first(x).relu())).relu()
        return self.fc(x.mean((2, 3)))


class Reader(CalibrationDataReader):
    def __init__(self, data: list[Tensor]) -> None:
        self._batches: Iterator[dict[str, np.ndarray]] = iter([{"input": batch.numpy()} for batch in data])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    torch.manual_seed(0)
    return batches(2)


@pytest.fixture(scope="module")
def float_file(data: list[Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("float") / "float.onnx"
    return export_onnx(settle(Residual()), data[0], path, dynamic_batch=False).path


def broken(path: Path) -> dict[str, set[str]]:
    """Rules that a file breaks, by target; targets whose rules it keeps are left out."""
    found = {name: {finding.rule for finding in check_onnx(path, name)} for name in TARGETS}
    return {name: rules for name, rules in found.items() if rules}


SYMMETRIC = {"ActivationSymmetric": True, "WeightSymmetric": True}

OF_ONNXRUNTIME: dict[str, tuple[dict[str, Any], dict[str, set[str]]]] = {
    "its defaults, int8 per tensor": (
        {},
        {
            "tensorrt": {"activation_zero_point", "bias"},
            "coreml": {"activation_zero_point"},
            "executorch": {"bias"},
            **{name: {"activation_type"} for name in ("openvino", "qnn")},
        },
    ),
    "uint8 activations, weights per channel": (
        {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True},
        {
            "tensorrt": {"activation_type", "activation_zero_point", "bias"},
            "coreml": {"activation_type", "activation_zero_point"},
            "executorch": {"activation_type", "bias"},
            "litert": {"activation_type"},
        },
    ),
    "symmetric, weights per channel": (
        {"per_channel": True, "extra_options": SYMMETRIC},
        {
            **{name: {"bias"} for name in ("tensorrt", "executorch")},
            **{name: {"activation_type"} for name in ("openvino", "qnn")},
        },
    ),
    "what TensorRT's users are told to set": (
        {"per_channel": True, "extra_options": {**SYMMETRIC, "QuantizeBias": False}},
        {name: {"activation_type"} for name in ("openvino", "qnn")},
    ),
}


@pytest.mark.parametrize(("keys", "wanted"), OF_ONNXRUNTIME.values(), ids=OF_ONNXRUNTIME)
def test_pairs_of_onnxruntime(
    float_file: Path, data: list[Tensor], keys: dict[str, Any], wanted: dict[str, set[str]], tmp_path: Path
) -> None:
    path = tmp_path / "quantized.onnx"
    quantize_static(float_file, path, Reader(data), quant_format=QuantFormat.QDQ, **keys)
    assert broken(path) == wanted


def test_operators_of_onnxruntime_break_the_form_everywhere(
    float_file: Path, data: list[Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "quantized.onnx"
    quantize_static(float_file, path, Reader(data), quant_format=QuantFormat.QOperator, per_channel=True)
    findings = {name: [f for f in check_onnx(path, name) if f.rule == "format"] for name in TARGETS}
    assert all(len(found) == len(findings["generic"]) > 3 for found in findings.values())
    assert {"QLinearConv", "QLinearAdd"} <= {finding.operator for finding in findings["tensorrt"]}
    assert all("QuantFormat.QDQ" in finding.remedy for finding in findings["tensorrt"])


@pytest.mark.parametrize(("preset", "affine"), [("PERFORMANCE", False), ("MIXED", True)])
def test_pairs_of_nncf(float_file: Path, data: list[Tensor], preset: str, affine: bool, tmp_path: Path) -> None:
    import nncf

    nncf.set_log_level(logging.ERROR)
    samples = nncf.Dataset([{"input": batch.numpy()} for batch in data])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nncf.quantize(
            onnx.load(float_file), samples, preset=getattr(nncf.QuantizationPreset, preset), subset_size=2
        )
    path = tmp_path / "nncf.onnx"
    onnx.save(model, path)
    zero_points = {"activation_zero_point"} if affine else set()
    assert broken(path) == {
        **{name: {"activation_type"} | zero_points for name in ("tensorrt", "coreml")},
        **{name: {"activation_type"} for name in ("executorch", "litert", "openvino", "qnn")},
    }
