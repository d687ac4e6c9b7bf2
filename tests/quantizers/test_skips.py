"""What is added to a layer's output is rounded too, where a target wants it, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from repapq_plugin import CalibrationResult, RepAPQConfig, export_onnx, quantize_model
from repapq_plugin.errors import ExportError
from repapq_plugin.evaluation.runtimes import OnnxRuntimeNetwork
from repapq_plugin.export.check import check_onnx
from repapq_plugin.quantizers.layers import QuantizedLayer
from repapq_plugin.quantizers.plan import SkipPlan
from repapq_plugin.quantizers.skips import SkippingModule, remove_skips
from repapq_plugin.result import QuantizationPlan
from repapq_plugin.targets import Target
from tests.support.networks import Pyramid, batches, settle

AFFINE = Target("affine with residuals", signed_activations=True, quantizes_residuals=True)


class Block(nn.Module):
    """A residual block; ``down`` brings the skipping summand to the other's size."""

    def __init__(self, width: int, stride: int, add: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, stride, 1)
        self.second = nn.Conv2d(width, width, 3, 1, 1)
        self.down = nn.Conv2d(width, width, 1, stride) if stride > 1 else None
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).relu())
        return self.add(x if self.down is None else self.down(x), y).relu()


def in_place(a: Tensor, b: Tensor) -> Tensor:
    a = a.clone()
    a += b
    return a


def in_place_by_name(a: Tensor, b: Tensor) -> Tensor:
    a = a.clone()
    a.add_(b)
    return a


def in_place_of_the_layer(a: Tensor, b: Tensor) -> Tensor:
    b += a
    return b


ADDITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "operator": lambda a, b: a + b,
    "turned": lambda a, b: b + a,
    "function": torch.add,
    "method": lambda a, b: b.add(a),
    "in place": in_place,
    "in place by name": in_place_by_name,
    "in place of the layer": in_place_of_the_layer,
    "scaled": lambda a, b: torch.add(a, b, alpha=0.5),
    "scaled, turned": lambda a, b: torch.add(b, a, alpha=0.5),
}


class Residual(nn.Module):
    def __init__(self, add: Callable[[Tensor, Tensor], Tensor] = ADDITIONS["operator"]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.stage = nn.Sequential(Block(8, 1, add), Block(8, 2, add))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage(self.stem(x).relu()))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def quantized(
    model: nn.Module, data: list[Tensor], target: str | Target = "tensorrt", **keys: object
) -> CalibrationResult:
    return quantize_model(model.eval(), data, RepAPQConfig.from_preset("w8a6", target=target, **{"steps": 2, **keys}))


def test_the_skipping_summand_has_the_quantizer_of_the_layer_that_reads_it_or_its_own() -> None:
    result = quantized(Residual(), batches(2))
    plans, skips = result.plan.layers, result.plan.skips
    assert skips == {
        "stage.0.second": SkipPlan("stage.0", "stage.0.second", 6, plans["stage.0.first"].input_group),
        "stage.1.second": SkipPlan("stage.1", "stage.1.second", 6, None),  # made by `down`, which nothing else reads
    }
    first, second = result.model.stage
    assert isinstance(first, SkippingModule) and isinstance(second, SkippingModule)
    assert first.skip_fake_quants[0] is first.first.input_fake_quant
    own = second.skip_fake_quants[0]
    assert own not in [m.input_fake_quant for m in result.model.modules() if isinstance(m, QuantizedLayer)]
    assert (own.quant_min, own.quant_max, own.zero_point.tolist()) == (-32, 31, [0])
    assert own.quantizing and not own.observing and own.scale.item() not in (0.0, 1.0)


@pytest.mark.parametrize("target", ["generic", "executorch", "coreml"])
def test_other_targets_have_none(target: str) -> None:
    result = quantized(Residual(), batches(1), target)
    assert result.plan.skips == {} and "skips" not in result.plan.to_dict()
    assert not any(isinstance(module, SkippingModule) for module in result.model.modules())


@pytest.mark.parametrize("add", ADDITIONS.values(), ids=ADDITIONS)
def test_it_is_computed_as_it_would_be_by_hand(add: Callable[[Tensor, Tensor], Tensor]) -> None:
    result = quantized(Residual(add), batches(2))
    model, x = result.model, torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        y = model.stem(x).relu()
        for block in model.stage:
            skip = y if block.down is None else block.down(y)
            y = add(block.skip_fake_quants[0](skip), block.second(block.first(y).relu())).relu()
        assert torch.equal(model(x), model.head(y))


def test_its_scale_learns() -> None:
    before, after = (quantized(Residual(), batches(2), steps=steps, guard_fraction=0.0) for steps in (0, 20))
    scales = [result.model.stage[1].skip_fake_quants[0].scale.item() for result in (before, after)]
    assert scales[0] != scales[1]


@pytest.mark.parametrize("target", ["tensorrt", AFFINE])
@pytest.mark.parametrize("kind", [Residual, Pyramid])
def test_results_come_back_and_files_say_the_same(kind: type[nn.Module], target: str | Target, tmp_path: Path) -> None:
    network, data = settle(kind()), batches(2)
    result = quantized(network, data, target)
    assert result.plan.skips
    loaded = CalibrationResult.load(result.save(tmp_path / "result.safetensors"), network)
    x = data[0]
    with torch.no_grad():
        wanted = result.model(x)
        again = loaded.model(x)
    outputs = [wanted] if isinstance(wanted, Tensor) else [y for part in wanted for y in part]
    repeated = [again] if isinstance(again, Tensor) else [y for part in again for y in part]
    assert all(torch.equal(a, b) for a, b in zip(outputs, repeated, strict=True))
    assert loaded.plan == result.plan
    summary = export_onnx(result, x, tmp_path / "model.onnx")
    assert summary.max_rel_difference is not None and summary.max_rel_difference < 1e-5
    assert check_onnx(summary.path, result.config.runs_on) == []
    if kind is Residual:
        integer = OnnxRuntimeNetwork(summary.path, threads=1, arithmetic="integer")(x)
        assert ((integer - outputs[0]).abs() / outputs[0].abs().max()).max() < 0.1


def test_a_shared_grid_is_one_pair_in_the_file(tmp_path: Path) -> None:
    data = batches(1)
    with_skips = export_onnx(quantized(Residual(), data, steps=0), data[0], tmp_path / "with.onnx")
    torch.manual_seed(0)
    model = Residual()
    without = export_onnx(quantized(model, batches(1), "coreml", steps=0), data[0], tmp_path / "without.onnx")
    assert with_skips.q_dq_pairs == without.q_dq_pairs + 1  # that of `down`
    adds = [node for node in onnx.load(with_skips.path).graph.node if node.op_type == "Add"]
    assert len(adds) == 2


def test_a_layer_that_stays_float_loses_its_summands_quantizer() -> None:
    result = quantized(Residual(), batches(1), keep_float=("stage.1.second",))
    assert list(result.plan.skips) == ["stage.0.second", "stage.1.down"]  # the other layer takes its place
    result = quantized(Residual(), batches(1), keep_float=("stage.1.second", "stage.1.down"))
    assert list(result.plan.skips) == ["stage.0.second"]


def test_without_it_modules_are_what_they_were() -> None:
    result = quantized(Residual(), batches(1))
    remove_skips(result.model, ["stage.1.second"])
    assert isinstance(result.model.stage[0], SkippingModule) and type(result.model.stage[1]) is Block
    remove_skips(result.model)
    assert type(result.model.stage[0]) is Block and "skip_fake_quants" not in result.model.stage[0]._modules


def test_a_folded_norm_and_an_idle_dropout_between_a_layer_and_its_sum_make_no_difference() -> None:
    class Between(Residual):
        def __init__(self) -> None:
            super().__init__()
            for block in self.stage:
                block.second = nn.Sequential(block.second, nn.BatchNorm2d(8), nn.Dropout(0.5))

    result = quantized(Between(), batches(1))
    assert {plan.layer for plan in result.plan.skips.values()} == {"stage.0.second.0", "stage.1.second.0"}
    assert list(result.plan.skips) == ["stage.0.second", "stage.1.second"]


class InPlace(Residual):
    """Blocks that add and rectify in place, one behind the other: a sum is the very tensor that a layer made."""

    def __init__(self) -> None:
        super().__init__(in_place_of_the_layer)
        self.stage.append(Block(8, 1, in_place_of_the_layer))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu_()
        for block in self.stage:
            y = block.second(block.first(x).relu_())
            y += x if block.down is None else block.down(x)
            x = y.relu_()
        return self.head(x)


def test_a_sum_in_place_of_a_layers_output_is_not_taken_for_it_later(tmp_path: Path) -> None:
    data = batches(1)
    result = quantized(InPlace(), data)
    assert list(result.plan.skips) == [f"stage.{number}.second" for number in range(3)]
    assert {plan.adding for plan in result.plan.skips.values()} == {""}  # the network adds
    assert check_onnx(export_onnx(result, data[0], tmp_path / "model.onnx").path, "tensorrt") == []
    with torch.inference_mode():
        first = result.model(data[0])
    with torch.no_grad():
        assert torch.equal(result.model(data[0]), first)


def test_an_unfinished_quantizer_stops_the_export(tmp_path: Path) -> None:
    data = batches(1)
    result = quantized(Residual(), data)
    result.model.stage[1].skip_fake_quants[0].enable_observer(True)
    with pytest.raises(ExportError, match=r"What is added to the output of 'stage\.1\.second' still observes"):
        export_onnx(result, data[0], tmp_path / "model.onnx")


def test_a_plan_without_skips_is_written_as_ever() -> None:
    assert "skips" not in QuantizationPlan().to_dict()
    assert QuantizationPlan(skips={"a": SkipPlan("", "b", 8, 0)}).to_dict()["skips"] == {
        "a": {"adding": "", "layer": "b", "bits": 8, "input_group": 0}
    }
