"""torchao's pt2e: graphs that compute what the calibrated network does, prepared, converted and lowered."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import ComposableQuantizer, Quantizer

from repapq_plugin import CalibrationResult, RepAPQConfig, export_onnx, quantize_model
from repapq_plugin.core.tensors import tensors_of
from repapq_plugin.errors import ConfigError, HostError
from repapq_plugin.export.deploy import without_quantizers
from repapq_plugin.hosts import pt2e
from repapq_plugin.quantizers.layers import QuantizedLayer
from tests.support.networks import Chain, Pyramid, batches, settle

QUICK = {"activation_observer": "min_max", "weight_observer": "min_max", "equalize": False}
LAYERS = {"Chain": (8, 8), "Pyramid": (9, 12)}
"""Quantized layers, and calls of them: the pyramid's heads are called on two levels."""
decomposed = torch.ops.quantized_decomposed


def images(count: int = 16) -> Tensor:
    return 2 * torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"Chain": settle(Chain()), "Pyramid": settle(Pyramid())}


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    torch.manual_seed(1)
    return batches(3)


@pytest.fixture(scope="module")
def results(networks: dict[str, nn.Module], data: list[Tensor]) -> dict[tuple[str, str], CalibrationResult]:
    configs = {
        ("Chain", "w8a8"): RepAPQConfig.from_preset("w8a8", steps=2, **QUICK),
        # With two steps a sum of one channel lies in the middle of two codes, to the last bit of float32.
        ("Chain", "w4a4"): RepAPQConfig.from_preset("w4a4", steps=3, **QUICK),
        ("Chain", "w2a3"): RepAPQConfig.from_preset("w2a3", steps=0, **QUICK),
        ("Chain", "w7a7"): RepAPQConfig.from_preset("w7a7", steps=0, first_last_bits=None, **QUICK),
        ("Pyramid", "w8a8"): RepAPQConfig.from_preset("w8a8", steps=0, **QUICK),
        ("Pyramid", "w4a4"): RepAPQConfig.from_preset("w4a4", steps=0, **QUICK),
        ("Pyramid", "w2a3"): RepAPQConfig.from_preset("w2a3", steps=0, keep_float=("up",), **QUICK),
    }
    return {key: quantize_model(networks[key[0]], data, config) for key, config in configs.items()}


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(tensors_of(one(x)), tensors_of(other(x)), strict=True))


def integer_weights(converted: GraphModule) -> int:
    return sum(tensor.dtype is torch.int8 and tensor.dim() > 1 for tensor in converted.state_dict().values())


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w2a3"])
@pytest.mark.parametrize("name", ["Chain", "Pyramid"])
def test_graphs_compute_what_was_calibrated(
    name: str, bits: str, results: dict[tuple[str, str], CalibrationResult]
) -> None:
    result = results[name, bits]
    before = copy.deepcopy(result.model.state_dict())
    prepared = pt2e.prepare_learned(result, (images(),))
    assert difference(prepared, result.model, images()) == 0
    converted = convert_pt2e(prepared)
    assert difference(converted, result.model, images()) == 0
    layers, calls = LAYERS[name]
    left_float = len(result.float_layers)
    called = [node.target for node in converted.graph.nodes if node.op == "call_function"]
    assert called.count(decomposed.dequantize_per_channel.default) == calls - left_float
    assert integer_weights(converted) == layers - left_float
    assert all(torch.equal(value, before[key]) for key, value in result.model.state_dict().items())


def test_the_batch_can_stay_open(results: dict[tuple[str, str], CalibrationResult]) -> None:
    result = results["Chain", "w4a4"]
    batch = torch.export.Dim("batch", min=2, max=512)
    prepared = pt2e.prepare_learned(result, (images(),), dynamic_shapes=({0: batch},), strict=True)
    converted = convert_pt2e(prepared)
    assert difference(converted, result.model, images(5)) == 0


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_torchaos_own_quantizer_takes_learned_values(
    bits: str, results: dict[tuple[str, str], CalibrationResult]
) -> None:
    result = results["Chain", bits]
    quantizer = pt2e.x86_inductor_quantizer(bits)
    program = torch.export.export(without_quantizers(result.model), (images(),))
    prepared = pt2e.carry_over(result, prepare_pt2e(program.module(), quantizer))
    assert difference(prepared, result.model, images()) == 0
    assert difference(convert_pt2e(prepared), result.model, images()) == 0


@pytest.mark.parametrize("bits", ["w7a7", "w4a4"])
def test_integer_kernels_compute_what_was_calibrated(
    bits: str, results: dict[tuple[str, str], CalibrationResult], data: list[Tensor], networks: dict[str, nn.Module]
) -> None:
    result = results["Chain", bits]
    if bits == "w4a4":  # at most seven bits everywhere, so that no kernel saturates on any processor
        config = RepAPQConfig.from_preset("w4a4", steps=0, first_last_bits=7, **QUICK)
        result = quantize_model(networks["Chain"], data, config)
    lowered = lower_pt2e_quantized_to_x86(convert_pt2e(pt2e.prepare_learned(result, (images(),))), (images(),))
    called = [str(node.target) for node in lowered.graph.nodes if node.op == "call_function"]
    assert sum("qconv_pointwise" in name for name in called) == 7
    assert sum("qlinear_pointwise" in name for name in called) == 1
    assert not any("dequantize" in name for name in called)
    with torch.no_grad():
        expected = result.model(images())
        # In integers a sum that lies between two codes may go the other way, in an image or two.
        close = torch.isclose(lowered(images()), expected, atol=1e-5 * float(expected.abs().max())).all(1)
    assert close.sum() >= len(close) - 1


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
@pytest.mark.parametrize("name", ["Chain", "Pyramid"])
def test_a_learned_graph_is_written_as_onnx(
    name: str, bits: str, results: dict[tuple[str, str], CalibrationResult], tmp_path: Path
) -> None:
    result = results[name, bits]
    network = pt2e.quantized_network(pt2e.prepare_learned(result, (images(),)))
    assert difference(network, result.model, images()) == 0
    written = export_onnx(network, images(), tmp_path / "graph.onnx", dynamic_batch=False)
    own = export_onnx(result, images(), tmp_path / "own.onnx", dynamic_batch=False)
    assert written.integer_layers == own.integer_layers
    assert written.max_rel_difference is not None and written.max_rel_difference < 1e-5


def test_a_graph_without_our_quantizers_is_not_written(networks: dict[str, nn.Module]) -> None:
    program = torch.export.export(networks["Chain"], (images(),)).module()
    with pytest.raises(HostError, match="No layer"):
        pt2e.quantized_network(program)


# Ranges only, with pt2e's own calls


@pytest.fixture(scope="module")
def merged(results: dict[tuple[str, str], CalibrationResult]) -> nn.Module:
    return without_quantizers(results["Chain", "w7a7"].model)


def prepared_by(quantizer: Quantizer, network: nn.Module, data: list[Tensor], is_qat: bool = False) -> GraphModule:
    program = torch.export.export(copy.deepcopy(network), (data[0],)).module()
    prepared = (prepare_qat_pt2e if is_qat else prepare_pt2e)(program, quantizer)
    with torch.no_grad():
        for batch in data:
            prepared(batch)
    return prepared


def grids(prepared: GraphModule) -> list[tuple[int, int]]:
    kinds = (pt2e.LearnableFakeQuantize, pt2e.MinMaxObserver.__mro__[1])
    modules = [module for module in prepared.modules() if isinstance(module, kinds)]
    return [(module.quant_min, module.quant_max) for module in modules]


@pytest.mark.parametrize("is_qat", [False, True])
def test_the_quantizer_alone(is_qat: bool, merged: nn.Module, data: list[Tensor]) -> None:
    quantizer = pt2e.RepAPQQuantizer(RepAPQConfig.from_preset("w4a4", **QUICK), is_qat=is_qat)
    prepared = prepared_by(quantizer, merged, data, is_qat)
    assert sorted(grids(prepared)) == sorted([(0, 15), (-7, 7)] * 6 + [(0, 255), (-127, 127)] * 2)
    if is_qat:
        for module in prepared.modules():
            if isinstance(module, pt2e.LearnableFakeQuantize):
                module.enable_observer(False)
        simulated = copy.deepcopy(prepared)
        assert difference(convert_pt2e(copy.deepcopy(prepared)), simulated, images(8)) == 0
        carried = pt2e.carry_grid(prepared)
        assert difference(carried, simulated, images(8)) == 0
    else:
        carried = pt2e.carry_grid(prepared)
    converted = convert_pt2e(carried)
    assert integer_weights(converted) == 8
    with torch.no_grad():
        assert (converted(data[0]) - merged(data[0])).abs().mean() < 0.5 * merged(data[0]).abs().mean()


@pytest.mark.parametrize("observer", ["min_max", "mse", "mae", "percentile", "auto"])
def test_every_observer(observer: str, merged: nn.Module, data: list[Tensor]) -> None:
    config = RepAPQConfig(activation_observer=observer, weight_observer="mse")
    converted = convert_pt2e(prepared_by(pt2e.RepAPQQuantizer(config), merged, data))
    assert integer_weights(converted) == 8
    with torch.no_grad():
        assert (converted(data[0]) - merged(data[0])).abs().mean() < 0.05 * merged(data[0]).abs().mean()


def test_names_choose_bits_and_what_stays_float(merged: nn.Module, data: list[Tensor]) -> None:
    config = RepAPQConfig.from_preset(
        "w4a4", keep_float=("stages.1",), layer_bits={"stages.2.*": (6, 5)}, first_last_bits=None, **QUICK
    )
    found = grids(prepared_by(pt2e.RepAPQQuantizer(config), merged, data))
    assert sorted(set(found)) == [(-31, 31), (-7, 7), (0, 15), (0, 31)]
    assert found.count((-31, 31)) == 2 and found.count((-7, 7)) == 4


def test_it_composes_with_another_quantizer(merged: nn.Module, data: list[Tensor]) -> None:
    ours = pt2e.RepAPQQuantizer(RepAPQConfig.from_preset("w6a6", keep_float=("fc",), **QUICK))
    theirs = pt2e.RepAPQQuantizer(RepAPQConfig.from_preset("w8a8", **QUICK))
    prepared = prepared_by(ComposableQuantizer([ours, theirs]), merged, data)
    assert sorted(set(grids(prepared))) == [(-127, 127), (-31, 31), (0, 63), (0, 255)]
    assert grids(prepared).count((-127, 127)) == 2  # the first layer, and what ours left


# What is refused


def test_what_cannot_be_carried_over_is_said(
    results: dict[tuple[str, str], CalibrationResult], networks: dict[str, nn.Module], data: list[Tensor]
) -> None:
    class Fickle(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x) if x.sum() > 0 else -self.network(x)

    result = results["Chain", "w8a8"]
    with pytest.raises(HostError, match="Fickle cannot be exported"):
        pt2e.prepare_learned(Fickle(result.model), (images(),))
    with pytest.raises(HostError, match="no quantized layer"):
        pt2e.prepare_learned(networks["Chain"], (images(),))
    other = torch.export.export(without_quantizers(results["Pyramid", "w8a8"].model), (images(),)).module()
    with pytest.raises(HostError, match="no layer 'fc', nor 7 more"):
        pt2e.carry_over(result, prepare_pt2e(other, pt2e.RepAPQQuantizer()))
    with pytest.raises(ConfigError, match="preset='w9a9'|weight_bits"):
        pt2e.RepAPQQuantizer("w9a9")


def test_calibration_and_graph_hold_the_very_same_numbers(
    results: dict[tuple[str, str], CalibrationResult],
) -> None:
    result = results["Chain", "w4a4"]
    prepared = pt2e.prepare_learned(result, (images(),))
    layers = [module for module in result.model.modules() if isinstance(module, QuantizedLayer)]
    learned = [module for module in prepared.modules() if isinstance(module, pt2e.LearnableFakeQuantize)]
    expected = [q for layer in layers for q in (layer.input_fake_quant, layer.weight_fake_quant)]
    assert len(learned) == len({id(quantizer) for quantizer in expected})
    for quantizer in expected:
        assert any(torch.equal(quantizer.log_scale, other.log_scale) for other in learned)
