"""Exported files behave as torch modules."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from repapq_plugin.errors import ConfigError, ExportError
from repapq_plugin.evaluation import OnnxRuntimeNetwork, OpenVINONetwork
from repapq_plugin.export import export_onnx
from tests.support.export_networks import Chain, SharedHead, example, make, outputs_of, quantized, set_ranges

RUNTIMES = [OnnxRuntimeNetwork, OpenVINONetwork]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_results_are_the_callers_own(runtime: type[torch.nn.Module], tmp_path: Path) -> None:
    model, x = make(SharedHead, 7, 8)
    export_onnx(model, x, tmp_path / "model.onnx")
    network = runtime(tmp_path / "model.onnx", threads=1)
    fine, coarse = network(x)
    kept = fine.clone(), coarse.clone()
    network(example(SharedHead, seed=5))
    assert torch.equal(fine, kept[0])
    assert torch.equal(coarse, kept[1])
    assert (fine.shape[1:], coarse.shape[1:]) == ((6, 12, 12), (6, 6, 6))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_one_output_is_a_tensor_and_any_memory_layout_will_do(runtime: type[torch.nn.Module], tmp_path: Path) -> None:
    model, x = make(Chain, 7, 8)
    export_onnx(model, x, tmp_path / "model.onnx")
    network = runtime(tmp_path / "model.onnx")
    y = network(x)
    assert isinstance(y, torch.Tensor)
    strided = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(network(strided), y)
    error = (y - outputs_of(model, x)[0]).abs().max() / y.abs().max()
    assert error < 2**-6


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_files_that_are_missing_or_broken_are_named(runtime: type[torch.nn.Module], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"There is no file .*nothing\.onnx"):
        runtime(tmp_path / "nothing.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"no ONNX")
    with pytest.raises(ExportError, match=r"cannot load .*broken\.onnx"):
        runtime(tmp_path / "broken.onnx")


@pytest.mark.parametrize("arithmetic", ["exact", "integer"])
def test_onnxruntime_does_not_saturate(arithmetic: Literal["exact", "integer"], tmp_path: Path) -> None:
    """A linear layer with all codes at their largest, which overflows 16 bits on older processors."""
    layer = quantized(torch.nn.Linear(64, 8, bias=False), 8, 8)
    torch.nn.init.ones_(layer.weight)
    x = torch.ones(2, 64)
    set_ranges(layer, x)
    export_onnx(layer, x, tmp_path / "model.onnx")
    y = OnnxRuntimeNetwork(tmp_path / "model.onnx", threads=1, arithmetic=arithmetic)(x)
    assert (y - 64).abs().max() < 64e-5
    with pytest.raises(ConfigError, match="arithmetic='fast' is not allowed"):
        OnnxRuntimeNetwork(tmp_path / "model.onnx", arithmetic="fast")  # type: ignore[arg-type]


def test_integer_arithmetic_runs_integer_kernels(tmp_path: Path) -> None:
    """Told apart by what they compute: a bias of half a step is rounded away, or is not."""
    layers = [quantized(torch.nn.Conv2d(4, 4, 1, bias=has_bias), 8, 8) for has_bias in (True, False)]
    torch.nn.init.ones_(layers[0].weight)
    model = set_ranges(torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1]), torch.ones(1, 4, 2, 2))
    with torch.no_grad():
        step = float(layers[0].input_fake_quant.scale * layers[0].weight_fake_quant.scale[0])
        layers[0].bias.fill_(0.49 * step)
        layers[1].input_fake_quant.set_qparams(torch.tensor(0.6 * step), torch.tensor(0))
    export_onnx(model, torch.zeros(1, 4, 2, 2), tmp_path / "model.onnx")
    zeros = torch.zeros(1, 4, 2, 2)
    exact, integer = (
        OnnxRuntimeNetwork(tmp_path / "model.onnx", threads=1, arithmetic=how)(zeros) for how in ("exact", "integer")
    )
    expected = outputs_of(model, zeros)[0]
    one_code = float(step * 0.6 * layers[1].weight.detach().abs().max())
    assert (exact - expected).abs().max() < 1e-3 * one_code
    assert (integer - expected).abs().max() > 1e-1 * one_code


def test_openvino_takes_fixed_shapes(tmp_path: Path) -> None:
    model, x = make(Chain, 7, 8)
    export_onnx(model, x, tmp_path / "model.onnx")
    network = OpenVINONetwork(tmp_path / "model.onnx", threads=1, input_shapes=[tuple(x.shape)])
    assert not network.compiled.inputs[0].partial_shape.is_dynamic
    assert (network(x) - outputs_of(model, x)[0]).abs().max() < 1e-5
    with pytest.raises(ExportError, match="cannot load"):
        OpenVINONetwork(tmp_path / "model.onnx", input_shapes=[])
