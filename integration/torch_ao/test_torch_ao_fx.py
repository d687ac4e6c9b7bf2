"""torch.ao's graph mode: a calibrated network becomes real integer modules that compute what was simulated."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn import quantized as nnq
from torch.ao.quantization import QConfig, QConfigMapping, disable_observer
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx
from torch.fx import GraphModule, symbolic_trace

from repapq_plugin import CalibrationResult, RepAPQConfig, export_onnx, quantize_model
from repapq_plugin.core.tensors import tensors_of
from repapq_plugin.errors import CalibrationError, ConfigError, HostError
from repapq_plugin.export.deploy import without_quantizers
from repapq_plugin.hosts import torch_ao
from repapq_plugin.hosts.torch_ao import engines
from repapq_plugin.hosts.torch_ao.fx import ENGINE, SIMULATED
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize
from repapq_plugin.quantizers.layers import QuantizedLayer
from tests.support.networks import Chain, Pyramid, batches, settle

INTEGER_LAYERS = (nnq.Conv2d, nnq.ConvTranspose2d, nnq.Linear)
TIES = 1
"""Images of 64 in which a sum may lie so near the middle of two codes that float and integers round apart."""
SEVEN = {"weight_bits": 7, "activation_bits": 7, "first_last_bits": None}


def images(count: int = 64) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def float_networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"Chain": settle(Chain()), "Pyramid": settle(Pyramid())}


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    torch.manual_seed(1)
    return batches(3)


@pytest.fixture(scope="module")
def results(float_networks: dict[str, nn.Module], data: list[Tensor]) -> dict[tuple[str, str], CalibrationResult]:
    quick = {"activation_observer": "min_max", "weight_observer": "min_max", "equalize": False}
    configs = {
        ("Chain", "w8a8"): RepAPQConfig.from_preset("w8a8", steps=2),
        # With two steps a sum of one channel lies in the middle of two codes, to the last bit of float32.
        ("Chain", "w4a4"): RepAPQConfig.from_preset("w4a4", steps=3, **quick),
        ("Chain", "w2a3"): RepAPQConfig.from_preset("w2a3", steps=0, **quick),
        ("Chain", "seven"): RepAPQConfig(steps=0, **SEVEN, **quick),
        ("Pyramid", "w8a8"): RepAPQConfig.from_preset("w8a8", steps=0, **quick),
        ("Pyramid", "w4a4"): RepAPQConfig.from_preset("w4a4", steps=0, **quick),
        ("Pyramid", "w2a3"): RepAPQConfig.from_preset("w2a3", steps=0, **quick),
        ("Pyramid", "seven"): RepAPQConfig(steps=0, **SEVEN, **quick),
    }
    return {key: quantize_model(float_networks[key[0]], data, config) for key, config in configs.items()}


@torch.no_grad()
def run(network: nn.Module, x: Tensor, engine: str) -> list[Tensor]:
    with torch_ao.integer_engine(engine):
        return tensors_of(network(x))


def parted_images(simulated: list[Tensor], integer: list[Tensor]) -> int:
    """Number of images of which any output value differs at all."""
    parts = [(a != b).flatten(1).any(1) for a, b in zip(simulated, integer, strict=True)]
    return int(torch.stack(parts).any(0).sum())


def parted_exactly(prepared: GraphModule, integer: GraphModule, engine: str) -> int:
    """`parted_images` of an integer network and of the graph that follows its engine to the last bit."""
    exact = torch_ao.simulate_integers(prepared, engine)
    return parted_images(run(exact, images(), engine), run(integer, images(), engine))


def integer_layers(network: nn.Module) -> int:
    return sum(isinstance(module, INTEGER_LAYERS) for module in network.modules())


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w2a3"])
@pytest.mark.parametrize("name", ["Chain", "Pyramid"])
def test_integer_modules_compute_what_was_simulated(
    name: str, bits: str, results: dict[tuple[str, str], CalibrationResult], data: list[Tensor]
) -> None:
    result = results[name, bits]
    prepared = torch_ao.prepare_learned(result, (data[0],), data)
    converted = torch_ao.convert_to_int8(prepared)
    engine = prepared.meta[ENGINE]
    assert parted_images(run(prepared, images(), engine), run(converted, images(), engine)) <= TIES
    assert parted_exactly(prepared, converted, engine) == 0
    # The heads are called on two levels and stand there twice.
    assert integer_layers(converted) == {"Chain": 8, "Pyramid": 12 if engine == "qnnpack" else 11}[name]
    assert not any(type(module) in (nn.Conv2d, nn.Linear) for module in converted.modules())


class Movers(nn.Module):
    """Operators that only move values stand between layers that learned grids of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Conv2d(8, 6, 3)
        self.pool, self.keep, self.act = nn.MaxPool2d(2), nn.Identity(), nn.ReLU()
        self.joined, self.last = nn.Conv2d(12, 8, 1), nn.Conv2d(8, 8, 1)
        self.classifier, self.other = nn.Linear(8, 4), nn.Linear(8 * 25, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.stem(x)))
        x = self.joined(torch.cat([self.keep(self.left(x)), self.right(self.keep(x)) * 3], 1))
        x = self.last(self.keep(x))
        return self.classifier(x.mean((2, 3))) + self.other(torch.flatten(x, 1))


@pytest.mark.parametrize("engine", ["x86", "qnnpack"])
@pytest.mark.parametrize("bits", ["w7a7", "w4a4"])
def test_what_moves_values_between_grids_loses_none_of_them(bits: str, engine: str, data: list[Tensor]) -> None:
    torch.manual_seed(0)
    config = RepAPQConfig.from_preset(bits, steps=0, first_last_bits=7, activation_observer="mse", equalize=False)
    result = quantize_model(Movers().eval(), data, config)
    prepared = torch_ao.prepare_learned(result, (data[0],), data, backend=engine)
    converted = torch_ao.convert_to_int8(prepared)
    assert parted_images(run(prepared, images(), engine), run(converted, images(), engine)) <= TIES
    assert parted_exactly(prepared, converted, engine) == 0
    assert integer_layers(converted) == 7
    mapping = torch_ao.repapq_qconfig_mapping(bits, engine, is_qat=True)
    named = calibrated(without_quantizers(result.model), mapping, data, is_qat=True)
    simulated, integer = torch_ao.carry_grid(named, engine), torch_ao.convert_to_int8(named, engine)
    apart = [a - b for a, b in zip(run(simulated, images(), engine), run(integer, images(), engine), strict=True)]
    assert (apart[0] != 0).any(1).sum() <= 4  # ranges that are sums of products meet ties more often
    assert parted_exactly(named, integer, engine) == 0


def test_with_a_reduced_range_the_fast_engine_is_exact(
    float_networks: dict[str, nn.Module], data: list[Tensor]
) -> None:
    config = RepAPQConfig(steps=0, reduce_range=True, activation_observer="min_max", equalize=False)
    prepared = torch_ao.prepare_learned(quantize_model(float_networks["Chain"], data, config), (data[0],), data)
    converted = torch_ao.convert_to_int8(prepared)
    assert prepared.meta[ENGINE] == "x86"
    assert parted_images(run(prepared, images(), "x86"), run(converted, images(), "x86")) <= TIES
    assert parted_exactly(prepared, converted, "x86") == 0
    weights = [m.weight().int_repr().abs().max() for m in converted.modules() if isinstance(m, INTEGER_LAYERS)]
    assert max(weights) == 63
    named = torch_ao.repapq_qconfig(RepAPQConfig(reduce_range=True)).weight()
    assert (named.quant_min, named.quant_max) == (-63, 63)


@pytest.mark.parametrize("engine", ["x86", "fbgemm", "onednn", "qnnpack"])
def test_every_engine_is_exact_up_to_seven_bits(
    engine: str, results: dict[tuple[str, str], CalibrationResult], data: list[Tensor]
) -> None:
    prepared = torch_ao.prepare_learned(results["Chain", "seven"], (data[0],), data, backend=engine)
    converted = torch_ao.convert_to_int8(prepared, engine)
    assert parted_images(run(prepared, images(), engine), run(converted, images(), engine)) <= TIES
    assert parted_exactly(prepared, converted, engine) == 0


def test_a_transposed_convolution_runs_as_calibrated_where_there_is_no_kernel(
    results: dict[tuple[str, str], CalibrationResult], data: list[Tensor]
) -> None:
    prepared = torch_ao.prepare_learned(results["Pyramid", "seven"], (data[0],), data, backend="x86")
    converted = torch_ao.convert_to_int8(prepared, "x86")
    up = converted.get_submodule("up")
    assert isinstance(up, nn.ConvTranspose2d) and isinstance(up, QuantizedLayer)
    assert prepared.meta[SIMULATED] == {"up": "x86 has no kernel for it"}
    assert integer_layers(converted) == 11
    assert parted_images(run(prepared, images(), "x86"), run(converted, images(), "x86")) <= TIES
    assert parted_exactly(prepared, converted, "x86") == 0


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_the_graph_has_what_was_learned_and_little_more(
    bits: str, results: dict[tuple[str, str], CalibrationResult], data: list[Tensor]
) -> None:
    result = results["Chain", bits]
    prepared = torch_ao.prepare_learned(result, (data[0],), data, backend="x86")
    learned = {m.input_fake_quant for m in result.model.modules() if isinstance(m, QuantizedLayer)}
    placed = [m for m in prepared.modules() if isinstance(m, LearnableFakeQuantize)]
    scales = [m.scale.item() for m in placed]
    assert len(placed) == len(learned) + 2  # in front of the pooling, and the logits
    for quantizer in learned:
        assert quantizer.scale.item() in scales
    weights = {m.weight.flatten()[0].item() for m in result.model.modules() if isinstance(m, QuantizedLayer)}
    kept = {m.weight.flatten()[0].item() for m in prepared.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert weights == kept
    # Those two outputs alone part the graph from the calibrated network, on data whose range they know.
    with torch.no_grad():
        difference = (prepared(data[0]) - result.model(data[0])).abs().max()
        assert difference < 0.02 * result.model(data[0]).abs().max()


def test_nothing_given_is_changed(
    results: dict[tuple[str, str], CalibrationResult], float_networks: dict[str, nn.Module], data: list[Tensor]
) -> None:
    result = results["Chain", "w4a4"]
    before = copy.deepcopy(result.model.state_dict())
    prepared = torch_ao.prepare_learned(result, (data[0],), data)
    graph, state = prepared.code, copy.deepcopy(prepared.state_dict())
    torch_ao.convert_to_int8(prepared)
    assert all(torch.equal(value, before[key]) for key, value in result.model.state_dict().items())
    assert prepared.code == graph
    assert all(torch.equal(value, state[key]) for key, value in prepared.state_dict().items())


def test_the_engine_is_restored() -> None:
    before = torch.backends.quantized.engine
    with pytest.raises(KeyError), torch_ao.integer_engine("qnnpack"):
        raise KeyError
    assert torch.backends.quantized.engine == before


# By name in a QConfigMapping, with torch.ao's own calls


def calibrated(network: nn.Module, mapping: QConfigMapping, data: list[Tensor], is_qat: bool) -> GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if is_qat:
            prepared = prepare_qat_fx(copy.deepcopy(network).train(), mapping, (data[0],)).eval()
        else:
            prepared = prepare_fx(copy.deepcopy(network).eval(), mapping, (data[0],))
    with torch.no_grad():
        for batch in data:
            prepared(batch)
    prepared.apply(disable_observer)
    return prepared


@pytest.fixture(scope="module")
def merged(results: dict[tuple[str, str], CalibrationResult]) -> nn.Module:
    """A float network without branches, as somebody has one who comes with torch.ao's own calls."""
    return without_quantizers(results["Chain", "seven"].model)


@pytest.mark.parametrize("bits", ["w8a8", "w6a6", "w4a4"])
def test_training_flow_by_name(bits: str, merged: nn.Module, data: list[Tensor]) -> None:
    engine = torch_ao.exact_engine()
    mapping = torch_ao.repapq_qconfig_mapping(bits, engine, is_qat=True, first_last=["fc"])
    prepared = calibrated(merged, mapping, data, is_qat=True)
    simulated = torch_ao.carry_grid(prepared)
    converted = torch_ao.convert_to_int8(prepared)
    assert integer_layers(converted) == 8
    assert parted_images(run(simulated, images(), engine), run(converted, images(), engine)) <= TIES
    assert parted_exactly(prepared, converted, engine) == 0
    if engine not in engines.INTEGER_BIAS:
        assert torch.equal(run(simulated, images(), engine)[0], run(prepared, images(), engine)[0])


class Normed(nn.Module):
    """Layers with the batch norms that torch.ao fuses into them for training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.last, self.last_norm = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.fc, self.fc_norm = nn.Linear(8, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last_norm(self.last(self.act(self.norm(self.stem(x)))))
        return self.fc_norm(self.fc(x.mean((2, 3))))


@pytest.mark.parametrize("engine", ["x86", "qnnpack"])
@pytest.mark.parametrize("bits", ["w7a7", "w4a4"])
def test_norms_that_are_trained_with_their_layer(bits: str, engine: str, data: list[Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = settle(Normed())
    mapping = torch_ao.repapq_qconfig_mapping(bits, engine, is_qat=True)
    prepared = calibrated(network, mapping, data, is_qat=True)
    before = copy.deepcopy(prepared.state_dict())
    integer = torch_ao.convert_to_int8(prepared, engine)
    assert integer_layers(integer) == 3
    assert not any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in integer.modules())
    assert parted_exactly(prepared, integer, engine) == 0
    simulated = run(prepared, images(), engine)[0]
    gap = (run(integer, images(), engine)[0] - simulated).abs()
    # Biases on the grid of 4-bit products are coarse.
    assert gap.mean() < (0.05 if engine in engines.INTEGER_BIAS else 0.001) * simulated.abs().mean()
    assert all(torch.equal(value, before[key]) for key, value in prepared.state_dict().items())
    written = export_onnx(torch_ao.quantized_network(prepared), data[0], tmp_path / "graph.onnx")
    assert written.integer_layers == 3 and written.operators["Relu"] == 1


@pytest.mark.parametrize("observer", ["min_max", "mse", "mae", "percentile", "auto"])
def test_observers_alone_by_name(observer: str, merged: nn.Module, data: list[Tensor]) -> None:
    config = RepAPQConfig(activation_observer=observer, weight_bits=6, activation_bits=6)
    prepared = calibrated(merged, torch_ao.repapq_qconfig_mapping(config, "x86"), data, is_qat=False)
    converted = torch_ao.convert_to_int8(prepared, "x86")
    assert integer_layers(converted) == 8
    for module in converted.modules():
        if isinstance(module, INTEGER_LAYERS):
            assert module.weight().int_repr().abs().max() <= 31
    assert parted_exactly(prepared, converted, "x86") == 0
    difference = (run(converted, data[0], "x86")[0] - merged(data[0])).abs().mean()
    assert difference < 0.2 * merged(data[0]).abs().mean()


def test_without_the_carried_grid_four_bits_are_forgotten(merged: nn.Module, data: list[Tensor]) -> None:
    mapping = torch_ao.repapq_qconfig_mapping("w4a4", "x86", is_qat=True)
    prepared = calibrated(merged, mapping, data, is_qat=True)
    simulated = run(prepared, 4 * images(), "x86")[0]  # beyond the calibrated ranges: it must clip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forgetful = convert_fx(copy.deepcopy(prepared))
    carried = torch_ao.convert_to_int8(prepared, "x86")
    assert parted_images([simulated], run(forgetful, 4 * images(), "x86")) > 32
    assert parted_images([simulated], run(carried, 4 * images(), "x86")) <= TIES


def test_a_plain_qconfig(merged: nn.Module, data: list[Tensor]) -> None:
    qconfig = torch_ao.repapq_qconfig("w4a4", is_qat=True)
    assert isinstance(qconfig, QConfig)
    prepared = calibrated(merged, QConfigMapping().set_global(qconfig), data, is_qat=True)
    grids = {(m.quant_min, m.quant_max) for m in prepared.modules() if isinstance(m, LearnableFakeQuantize)}
    assert grids == {(0, 15), (-7, 7)}


# ONNX, through the one exporter


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
@pytest.mark.parametrize("name", ["Chain", "Pyramid"])
def test_a_learned_graph_is_written_as_onnx(
    name: str, bits: str, results: dict[tuple[str, str], CalibrationResult], data: list[Tensor], tmp_path: Path
) -> None:
    result = results[name, bits]
    prepared = torch_ao.prepare_learned(result, (data[0],), data, backend="x86")
    network = torch_ao.quantized_network(prepared)
    for ours, theirs in zip(run(network, images(), "x86"), run(result.model, images(), "x86"), strict=True):
        assert torch.equal(ours, theirs)
    written = export_onnx(network, data[0], tmp_path / "graph.onnx")
    own = export_onnx(result, data[0], tmp_path / "own.onnx")
    assert written.integer_layers == own.integer_layers
    assert written.max_rel_difference is not None and written.max_rel_difference < 1e-5


def test_a_graph_of_observers_is_written_as_onnx(merged: nn.Module, data: list[Tensor], tmp_path: Path) -> None:
    config = RepAPQConfig(activation_observer="min_max", weight_bits=6, activation_bits=6)
    prepared = calibrated(merged, torch_ao.repapq_qconfig_mapping(config, "x86"), data, is_qat=False)
    written = export_onnx(torch_ao.quantized_network(prepared), data[0], tmp_path / "graph.onnx")
    assert written.integer_layers == 8 and written.operators["Clip"] == 8
    with pytest.raises(HostError, match="No layer"):
        torch_ao.quantized_network(symbolic_trace(merged))


# What is refused


def test_what_cannot_be_prepared_is_said(
    results: dict[tuple[str, str], CalibrationResult], float_networks: dict[str, nn.Module], data: list[Tensor]
) -> None:
    class Fickle(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x) if x.sum() > 0 else -self.network(x)

    result = results["Chain", "w8a8"]
    with pytest.raises(HostError, match="Fickle cannot be traced"):
        torch_ao.prepare_learned(Fickle(result.model), (data[0],), data)
    with pytest.raises(HostError, match="no quantized layer"):
        torch_ao.prepare_learned(float_networks["Chain"], (data[0],), data)
    with pytest.raises(CalibrationError, match="no batch"):
        torch_ao.prepare_learned(result, (data[0],), [])
    with pytest.raises(ConfigError, match="backend='cuda' is not allowed; torch here has"):
        torch_ao.repapq_qconfig_mapping("w8a8", "cuda")
    with pytest.raises(ConfigError, match="backend='tpu'"):
        torch_ao.prepare_learned(result, (data[0],), data, backend="tpu")


def test_who_saturates(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    # Not through logging itself: toolboxes that ran before may have set its levels.
    monkeypatch.setattr(engines.logger, "warning", lambda text, *values: said.append(text % values))
    monkeypatch.setattr(engines, "has_vnni", lambda: False)
    monkeypatch.setattr(engines, "_said", set())
    assert engines.saturates("x86") and not engines.saturates("x86", 7) and not engines.saturates("qnnpack")
    assert not engines.saturates("x86", 8, 7) and engines.saturates("fbgemm", 8, 8)
    assert engines.exact_engine() == "qnnpack" and engines.exact_engine([(7, 8), (8, 7), (4, 4)]) == "x86"
    for _ in range(2):
        engines.warn_of_saturation("x86")
    assert len(said) == 1 and "qnnpack" in said[0]
    monkeypatch.setattr(engines, "has_vnni", lambda: True)
    assert not engines.saturates("x86") and engines.exact_engine() == "x86"
