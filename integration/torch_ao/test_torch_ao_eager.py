"""torch.ao's eager mode: the integer network is at most one step of its output from the simulated one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn import quantized as nnq
from torch.ao.quantization import DeQuantStub, QuantStub, prepare_qat
from torch.ao.quantization import disable_observer as stop_observing

from repapq_plugin import CalibrationResult, RepAPQConfig, quantize_model
from repapq_plugin.errors import CalibrationError, ConfigError, HostError
from repapq_plugin.export.deploy import without_quantizers
from repapq_plugin.hosts import torch_ao
from repapq_plugin.hosts.torch_ao._compat import set_qconfig
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize
from repapq_plugin.quantizers.layers import QuantizedLayer
from tests.support.networks import Chain, TwoBranchBlock, batches, settle

QUICK = {"activation_observer": "min_max", "weight_observer": "min_max", "equalize": False}


class Stubbed(nn.Module):
    """Blocks in a row and a classifier, with torch.ao's stubs around them."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.blocks = nn.Sequential(TwoBranchBlock(3, 8, 2), TwoBranchBlock(8, 8), TwoBranchBlock(8, 12, 2))
        self.tail = nn.Conv2d(12, 6, 4)
        self.classifier = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.classifier(self.tail(self.blocks(self.quant(x))).flatten(1)))


def images(count: int = 64) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    torch.manual_seed(1)
    return batches(3)


@pytest.fixture(scope="module")
def results(data: list[Tensor]) -> dict[str, CalibrationResult]:
    torch.manual_seed(0)
    network = settle(Stubbed())
    configs = {
        "w8a8": RepAPQConfig.from_preset("w8a8", steps=2, **QUICK),
        "w4a4": RepAPQConfig.from_preset("w4a4", steps=2, **QUICK),
        "w7a7": RepAPQConfig.from_preset("w7a7", steps=0, first_last_bits=None, **QUICK),
    }
    return {name: quantize_model(network, data, config) for name, config in configs.items()}


@torch.no_grad()
def steps_apart(prepared: nn.Module, converted: nn.Module, engine: str) -> Tensor:
    """Difference of each output value, in steps of the output's grid."""
    with torch_ao.integer_engine(engine):
        gap = (prepared(images()) - converted(images())).abs()
    last = [module for module in converted.modules() if isinstance(module, nnq.Linear)][-1]
    return gap / last.scale


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_integer_modules_stay_within_one_step(
    bits: str, results: dict[str, CalibrationResult], data: list[Tensor]
) -> None:
    result = results[bits]
    before = copy.deepcopy(result.model.state_dict())
    engine = torch_ao.exact_engine()
    prepared = torch_ao.prepare_learned_eager(result, data)
    converted = torch_ao.convert_eager(prepared)
    gap = steps_apart(prepared, converted, engine)
    assert gap.max() < 1.01
    assert (gap > 0.5).float().mean() < 0.02
    assert sum(isinstance(module, nnq.Conv2d | nnq.Linear) for module in converted.modules()) == 5
    assert all(torch.equal(value, before[key]) for key, value in result.model.state_dict().items())


@pytest.mark.parametrize("engine", ["x86", "fbgemm", "onednn", "qnnpack"])
def test_every_engine_up_to_seven_bits(engine: str, results: dict[str, CalibrationResult], data: list[Tensor]) -> None:
    prepared = torch_ao.prepare_learned_eager(results["w7a7"], data, backend=engine)
    assert steps_apart(prepared, torch_ao.convert_eager(prepared, engine), engine).max() < 1.01


def test_the_network_holds_what_was_learned(results: dict[str, CalibrationResult], data: list[Tensor]) -> None:
    result = results["w4a4"]
    prepared = torch_ao.prepare_learned_eager(result, data, backend="x86")
    scales = [m.log_scale.item() for m in prepared.modules() if isinstance(m, LearnableFakeQuantize)]
    learned = {m.input_fake_quant for m in result.model.modules() if isinstance(m, QuantizedLayer)}
    found = [quantizer for quantizer in learned if quantizer.log_scale.item() in scales]
    assert len(found) == 4  # the classifier reads a flattened tensor, which no module of eager mode has made
    with torch.no_grad():
        expected = result.model(data[0])
        assert (prepared(data[0]) - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_network_without_stubs_is_wrapped(data: list[Tensor]) -> None:
    torch.manual_seed(0)
    result = quantize_model(settle(Chain()), data, RepAPQConfig.from_preset("w8a8", steps=0, **QUICK))
    engine = torch_ao.exact_engine()
    prepared = torch_ao.prepare_learned_eager(result, data)
    converted = torch_ao.convert_eager(prepared)
    assert isinstance(prepared, torch.ao.quantization.QuantWrapper)
    # Its mean over four values is rounded in integers, which shows behind the linear layer.
    assert steps_apart(prepared, converted, engine).mean() < 1


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_training_by_name(bits: str, results: dict[str, CalibrationResult], data: list[Tensor]) -> None:
    network = without_quantizers(results["w7a7"].model).train()
    set_qconfig(network, torch_ao.repapq_qconfig(bits, is_qat=True))
    prepared = prepare_qat(network)
    for batch in data:
        prepared(batch)
    prepared.apply(stop_observing)
    prepared.eval()
    converted = torch_ao.convert_eager(prepared, "x86")
    codes = [m.weight().int_repr() for m in converted.modules() if isinstance(m, nnq.Conv2d | nnq.Linear)]
    bound = 127 if bits == "w8a8" else 7
    assert len(codes) == 5 and max(int(code.abs().max()) for code in codes) == bound
    if bits == "w4a4":
        assert steps_apart(prepared, converted, "x86").max() < 1.01


def test_what_cannot_be_prepared_is_said(results: dict[str, CalibrationResult], data: list[Tensor]) -> None:
    with pytest.raises(HostError, match="no quantized layer"):
        torch_ao.prepare_learned_eager(Stubbed(), data)
    with pytest.raises(CalibrationError, match="no batch"):
        torch_ao.prepare_learned_eager(results["w8a8"], [])
    with pytest.raises(ConfigError, match="backend='none'"):
        torch_ao.prepare_learned_eager(results["w8a8"], data, backend="none")
