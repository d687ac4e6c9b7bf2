"""The first layer that differs is the one in which something was changed, and no layer behind it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from repapq_plugin import CalibrationResult, RepAPQConfig, export_onnx, quantize_model
from repapq_plugin.diagnosis.differences import ALIKE, first_difference
from repapq_plugin.errors import ExportError
from repapq_plugin.evaluation.layer_differences import layer_differences
from tests.support.networks import Chain, batches, settle


@pytest.fixture(scope="module")
def result() -> CalibrationResult:
    torch.manual_seed(0)
    return quantize_model(settle(Chain()), batches(), RepAPQConfig(weight_bits=4, activation_bits=4, steps=0))


@pytest.fixture(scope="module")
def example() -> Tensor:
    return batches()[0][:1]


@pytest.fixture(scope="module")
def file(result: CalibrationResult, example: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(result, example, tmp_path_factory.mktemp("file") / "net.onnx").path


def planted(file: Path, folder: Path, layer: str, what: str) -> Path:
    """Change one weight, or the bias, of a layer in a copy of a file."""
    graph = onnx.load(file)
    for initializer in graph.graph.initializer:
        if initializer.name == f"{layer}.{what}":
            values = numpy_helper.to_array(initializer).copy()
            values.flat[0] = values.flat[0] + (np.abs(values).max() or 1)
            initializer.CopyFrom(numpy_helper.from_array(values, initializer.name))
            changed = folder / "changed.onnx"
            onnx.save(graph, changed)
            return changed
    raise AssertionError(f"no {what} of {layer}")


def test_a_file_as_exported_differs_nowhere(result: CalibrationResult, file: Path, example: Tensor) -> None:
    found = layer_differences(result.model, file, example)
    assert [each.layer for each in found] == list(result.layers)
    assert max(each.own for each in found) < 1e-5
    assert first_difference(found) is None


@pytest.mark.parametrize("what", ["weight_codes", "bias"])
def test_what_was_planted_is_the_first_that_differs(
    what: str, result: CalibrationResult, file: Path, example: Tensor, tmp_path: Path
) -> None:
    layers = list(result.layers)
    for layer in (layers[0], layers[len(layers) // 2], layers[-1]):
        found = layer_differences(result.model, planted(file, tmp_path, layer, what), example)
        first = first_difference(found)
        assert first is not None and first.layer == layer
        assert [each.layer for each in found if each.own > ALIKE] == [layer]  # those behind it compute as they should
        assert first.arriving < 1e-5
        if layer != layers[-1]:
            assert max(each.arriving for each in found[layers.index(layer) + 1 :]) > ALIKE


def test_another_network_is_refused(file: Path, example: Tensor) -> None:
    with pytest.raises(ExportError, match="has no layer of this network"):
        layer_differences(nn.Conv2d(3, 3, 1), file, example)


def test_what_is_no_file_is_refused(result: CalibrationResult, example: Tensor, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match="broken.onnx"):
        layer_differences(result.model, tmp_path / "broken.onnx", example)
    with pytest.raises(ExportError, match="missing.onnx"):
        layer_differences(result.model, tmp_path / "missing.onnx", example)
