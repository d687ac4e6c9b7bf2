"""The learnable fake quantizers live inside torch.ao's workflows and torch.export."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import QConfig, QConfigMapping, convert, disable_observer, prepare_qat
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

from repapq_plugin.observers import (
    MAEObserver,
    MinMaxObserver,
    MSEObserver,
    PercentileObserver,
    PerChannelMinMaxObserver,
    PerChannelMSEObserver,
    RangeObserver,
)
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize, PerChannelLearnableFakeQuantize
from tests.support.fake_quantizers import per_channel, per_tensor


class SmallNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant = torch.ao.quantization.QuantStub()
        self.conv = nn.Conv2d(3, 8, 3)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8 * 36, 4)
        self.dequant = torch.ao.quantization.DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.fc(self.relu(self.conv(self.quant(x))).flatten(1)))


IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(3))
# Seven bits of activation: the integer kernels of a CPU without VNNI saturate on more.
SEVEN_BITS = {"quant_min": 0, "quant_max": 127}
by_name = QConfig(
    activation=LearnableFakeQuantize.with_args(observer=MAEObserver, **SEVEN_BITS),
    weight=PerChannelLearnableFakeQuantize.with_args(observer=PerChannelMSEObserver),
)


def learn_scales(prepared: nn.Module) -> list[LearnableFakeQuantize]:
    """Observe, then move every scale by hand, so that a converted model can only have it from there."""
    prepared(IMAGES)
    prepared.apply(disable_observer)
    quantizers = [module for module in prepared.modules() if isinstance(module, LearnableFakeQuantize)]
    for quantizer in quantizers:
        quantizer.log_scale.data += 0.1
    return quantizers


@pytest.fixture
def _x86_engine() -> Iterator[None]:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "x86" if "x86" in torch.backends.quantized.supported_engines else before
    yield
    torch.backends.quantized.engine = before


@pytest.mark.usefixtures("_x86_engine")
def test_fx_quantization_aware_training_takes_the_learned_scales() -> None:
    prepared = prepare_qat_fx(SmallNet().train(), QConfigMapping().set_global(by_name), (IMAGES,))
    quantizers = learn_scales(prepared)
    assert {type(q) for q in quantizers} == {LearnableFakeQuantize, PerChannelLearnableFakeQuantize}
    assert prepared.conv.weight_fake_quant.scale.shape == (8,)
    fake = prepared.eval()(IMAGES)
    weight_scales = prepared.conv.weight_fake_quant.scale.detach().double()
    converted = convert_fx(prepared)
    conv = converted.conv
    assert torch.allclose(conv.weight().q_per_channel_scales(), weight_scales, rtol=1e-6)
    output_scales = [q.scale.item() for q in quantizers if type(q) is LearnableFakeQuantize]
    assert any(conv.scale == pytest.approx(scale) for scale in output_scales)
    step = max(output_scales)
    assert (converted(IMAGES) - fake).abs().max() <= 1.01 * step


@pytest.mark.usefixtures("_x86_engine")
def test_eager_quantization_aware_training_takes_the_learned_scales() -> None:
    net = SmallNet().train()
    net.qconfig = by_name  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare_qat(net)
        quantizers = learn_scales(prepared)
        fake = prepared.eval()(IMAGES)
        converted = convert(prepared)
    assert len(quantizers) == 5  # the input, and of two layers output and weight
    expected = prepared.fc.activation_post_process.scale.item()
    assert converted.fc.scale == pytest.approx(expected)
    assert torch.allclose(
        converted.fc.weight().q_per_channel_scales(), prepared.fc.weight_fake_quant.scale.detach().double(), rtol=1e-6
    )
    # Integer kernels round once where the simulation rounds twice: codes may differ, a few, by little.
    difference = (converted(IMAGES) - fake).abs()
    assert difference.max() <= 3 * expected and (difference < 0.5 * expected).float().mean() > 0.8


@pytest.mark.usefixtures("_x86_engine")
@pytest.mark.parametrize("observer", [MinMaxObserver, MAEObserver, MSEObserver, PercentileObserver])
def test_fx_post_training_quantization_takes_the_observers_alone(observer: type[RangeObserver]) -> None:
    weight = PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
    mapping = QConfigMapping().set_global(QConfig(observer.with_args(**SEVEN_BITS), weight))
    net = SmallNet().eval()
    prepared = prepare_fx(net, mapping, (IMAGES,))
    prepared(IMAGES)
    seen = [module for module in prepared.modules() if isinstance(module, observer)]
    scales = [float(each.calculate_qparams()[0]) for each in seen]
    converted = convert_fx(prepared)
    assert len(seen) >= 3
    assert any(converted.fc.scale == pytest.approx(scale) for scale in scales)
    assert (converted(IMAGES) - net(IMAGES)).abs().mean() < 0.05 * net(IMAGES).abs().mean()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_torch_export_takes_a_module_that_holds_them(strict: bool, training: bool) -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input = per_tensor(bits=8)
            self.weight = per_channel(5, 0)
            self.layer = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.input(x), self.weight(self.layer.weight), self.layer.bias)

    module = Held().train(training)
    x = torch.randn(4, 3)
    program = torch.export.export(module, (x,), strict=strict)
    other = torch.randn(4, 3)
    assert torch.equal(program.module()(other), module(other))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("round" in name for name in called) == 2
