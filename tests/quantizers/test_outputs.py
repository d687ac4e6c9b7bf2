"""What integer kernels write is rounded where a target wants it, and every layer is computed in integers then."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from repapq_plugin import CalibrationResult, RepAPQConfig, export_onnx, quantize_model
from repapq_plugin.errors import ExportError
from repapq_plugin.export.check import check_onnx
from repapq_plugin.quantizers.layers import QuantizedLayer, RoundedLayer
from repapq_plugin.quantizers.outputs import RoundedModule, remove_outputs
from repapq_plugin.quantizers.plan import OutputPlan, QuantizationPlan
from tests.support.networks import batches

INTEGER = ("QLinearConv", "QGemm")


class Mixed(nn.Module):
    """Outputs that pooling, a concatenation, a SiLU, an addition, layers and the user read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2))
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(inplace=True))
        self.right = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Dropout(0.5))
        self.joined = nn.Conv2d(16, 8, 1)
        self.act = nn.SiLU()
        self.last = nn.Sequential(nn.Conv2d(8, 12, 3, 1, 1), nn.ReLU6())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        left = self.left(x)
        x = self.act(self.joined(torch.cat([left, self.right(left)], 1)))
        x = self.last(x + left)
        return self.fc(self.pool(x).flatten(1)), x


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def quantized(model: nn.Module, target: str = "onnxruntime", **keys: object) -> CalibrationResult:
    preset = RepAPQConfig.from_preset("w8a8", target=target, **{"steps": 2, **keys})
    return quantize_model(model.eval(), batches(2), preset)


def kernels(path: Path) -> Counter[str]:
    """Return the operators of the graph that onnxruntime executes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".executed.onnx"))
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def test_what_one_group_of_layers_reads_needs_no_quantizer_and_all_else_has_one() -> None:
    result = quantized(Mixed())
    plans = result.plan.layers
    # The stem is read through pooling alone. `right` is read in the concatenation alone, `left` besides by `right`.
    assert result.plan.outputs == {
        "joined": OutputPlan(("joined",), 8, None),
        "last.1": OutputPlan(("last.0",), 8, None),
        "left.1": OutputPlan(("left.0",), 8, plans["right.0"].input_group),
    }
    model = result.model
    assert isinstance(model.joined, RoundedLayer) and isinstance(model.last[1], RoundedModule)
    assert model.left[1].output_fake_quant is model.right[0].input_fake_quant
    own = model.last[1].output_fake_quant
    assert (own.quant_min, own.quant_max, own.zero_point.tolist()) == (0, 255, [0])
    assert own.quantizing and not own.observing and own.scale.item() not in (0.0, 1.0)


def test_it_is_computed_as_it_would_be_by_hand() -> None:
    model, x = quantized(Mixed()).model, torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        left = model.left[1].output_fake_quant(model.left[0](model.stem(x)).relu())
        joined = model.joined(torch.cat([left, model.right(left)], 1))
        assert torch.equal(joined, model.joined.output_fake_quant(joined))
        last = model.last[1].output_fake_quant(model.last[0](model.act(joined) + left).clamp(0, 6))
        scores, features = model(x)
        assert torch.equal(features, last)
        assert torch.equal(scores, model.fc(model.pool(last).flatten(1)))


def test_the_scales_of_outputs_learn() -> None:
    results = [quantized(Mixed(), steps=steps, guard_fraction=0.0) for steps in (0, 20)]
    for place in ("joined", "last.1"):
        scales = [result.model.get_submodule(place).output_fake_quant.scale.item() for result in results]
        assert scales[0] != scales[1]


@pytest.mark.parametrize("bits", [8, 5])
def test_files_compute_the_same_and_with_8_bits_every_layer_in_integers(bits: int, tmp_path: Path) -> None:
    network = Mixed()
    result = quantized(network, weight_bits=bits, activation_bits=bits)
    loaded = CalibrationResult.load(result.save(tmp_path / "result.safetensors"), network)
    x = batches(1)[0]
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(result.model(x), loaded.model(x), strict=True))
    assert loaded.plan == result.plan
    summary = export_onnx(result, x, tmp_path / "model.onnx")
    assert summary.max_rel_difference is not None and summary.max_rel_difference < 1e-5
    assert check_onnx(summary.path, "onnxruntime") == []
    if bits < 8:
        return  # a Clip stands between a layer and its pair
    found = kernels(summary.path)
    assert sum(found[kind] for kind in INTEGER) == summary.integer_layers == len(result.plan.layers)
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "MaxPool", "Concat", "GlobalAveragePool"} & found.keys()


def test_other_targets_have_none_and_their_files_leave_layers_in_float(tmp_path: Path) -> None:
    result = quantized(Mixed(), "generic")
    assert result.plan.outputs == {} and "outputs" not in result.plan.to_dict()
    assert not any(isinstance(module, RoundedLayer | RoundedModule) for module in result.model.modules())
    found = kernels(export_onnx(result, batches(1)[0], tmp_path / "model.onnx").path)
    assert sum(found[kind] for kind in INTEGER) < len(result.plan.layers)


def test_biases_are_multiples_of_both_scales_and_whole_numbers_in_the_file(tmp_path: Path) -> None:
    result = quantized(Mixed())
    for layer in (module for module in result.model.modules() if isinstance(module, QuantizedLayer)):
        unit = layer.input_fake_quant.scale * layer.weight_fake_quant.scale
        assert torch.equal(torch.round(layer.bias / unit) * unit, layer.bias)
    graph = onnx.load(export_onnx(result, batches(1)[0], tmp_path / "model.onnx").path).graph
    gemm = next(node for node in graph.node if node.op_type == "Gemm")
    bias = next(node for node in graph.node if node.output[0] == gemm.input[2])
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    values = torch.tensor(stored[bias.input[0]].astype("float32") * stored[bias.input[1]])
    assert stored[bias.input[0]].dtype.name == "int32" and torch.equal(values, result.model.fc.bias)


def test_what_a_float_layer_gives_is_not_rounded() -> None:
    result = quantized(Mixed(), keep_float=("joined", "last.0"))
    assert list(result.plan.outputs) == ["left.1", "right.0"]  # the second: a float layer reads it now


def test_an_activation_in_the_middle_of_a_forward_is_left_alone() -> None:
    class Middle(Mixed):
        def forward(self, x: Tensor) -> Tensor:
            return self.pool(self.stem[0](x).relu())

    assert quantized(Middle()).plan.outputs == {}


def test_without_them_modules_are_what_they_were() -> None:
    model = quantized(Mixed()).model
    remove_outputs(model, ["joined"])
    assert not isinstance(model.joined, RoundedLayer) and isinstance(model.joined, QuantizedLayer)
    assert isinstance(model.last[1], RoundedModule)
    remove_outputs(model)
    assert type(model.last[1]) is nn.ReLU6 and "output_fake_quant" not in model.last[1]._modules


def test_an_unfinished_quantizer_stops_the_export(tmp_path: Path) -> None:
    result = quantized(Mixed())
    result.model.joined.output_fake_quant.enable_observer(True)
    with pytest.raises(ExportError, match="The output of 'joined' still observes"):
        export_onnx(result, batches(1)[0], tmp_path / "model.onnx")


def test_a_plan_without_outputs_is_written_as_ever() -> None:
    assert "outputs" not in QuantizationPlan().to_dict()
    plan = QuantizationPlan(outputs={"a": OutputPlan(("b",), 8, 0)}).to_dict()
    assert plan["outputs"] == {"a": {"layers": ("b",), "bits": 8, "input_group": 0}}
