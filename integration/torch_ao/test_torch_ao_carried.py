"""Layers that no integer module can stand for, and what stands for the others."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn import quantized as nnq
from torch.ao.quantization import DeQuantStub, QuantStub

from repapq_plugin import CalibrationResult, RepAPQConfig, export_onnx, quantize_model
from repapq_plugin.core.copies import own_batch
from repapq_plugin.errors import HostError
from repapq_plugin.hosts import torch_ao
from repapq_plugin.hosts.torch_ao.carried import Padding, plain_layer_of, reason_to_simulate
from repapq_plugin.hosts.torch_ao.fx import ENGINE, SIMULATED
from repapq_plugin.hosts.torch_ao.hosted import quantize_network
from repapq_plugin.quantizers.layers import QuantizedLayer
from tests.support.networks import settle
from tests.support.own_layers import Padded, Standardized

Make = Callable[..., nn.Module]


def batches() -> list[Tensor]:
    return [torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def calibrated(model: nn.Module, preset: str = "w8a8") -> CalibrationResult:
    return quantize_model(settle(model, 12), batches(), RepAPQConfig.from_preset(preset, steps=0, reduce_range=True))


def row(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), *middle, nn.ReLU(), nn.Conv2d(8, 4, 1))


def quantized(**keys: object) -> QuantizedLayer:
    make: Make = nn.Conv2d
    layer = calibrated(row(make(8, 8, **keys))).model[2]
    assert isinstance(layer, QuantizedLayer)
    return layer


def apart(some: Tensor, other: Tensor) -> float:
    return float((some - other).abs().mean() / other.abs().mean())


def in_fx(result: CalibrationResult) -> tuple[float, dict[str, str]]:
    """Return how far integers are from what was calibrated, and what was not carried."""
    data = batches()
    prepared = torch_ao.prepare_learned(result, (data[0],), data)
    converted = torch_ao.convert_to_int8(prepared)
    with torch_ao.integer_engine(prepared.meta[ENGINE]), torch.no_grad():
        found = apart(converted(data[0].clone()), result.model(data[0].clone()))
        assert torch.equal(torch_ao.simulate_integers(prepared)(data[0].clone()), converted(data[0].clone()))
    return found, prepared.meta[SIMULATED]


def in_eager(result: CalibrationResult) -> tuple[float, nn.Module]:
    data = batches()
    converted = torch_ao.convert_eager(torch_ao.prepare_learned_eager(result, data))
    with torch_ao.integer_engine(torch_ao.exact_engine()), torch.no_grad():
        return apart(converted(data[0].clone()), result.model(data[0].clone())), converted


# What stands for a layer


@pytest.mark.parametrize(
    ("keys", "padding", "amounts"),
    [
        ({"kernel_size": 3, "padding": "same"}, (1, 1), None),
        ({"kernel_size": (3, 5), "padding": "same", "dilation": (2, 1)}, (2, 2), None),
        ({"kernel_size": 3, "padding": "valid"}, (0, 0), None),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, (1, 1), None),
        ({"kernel_size": 3, "padding": "same", "padding_mode": "reflect"}, (1, 1), None),
        ({"kernel_size": 4, "padding": "same"}, (0, 0), [1, 2, 1, 2]),
        ({"kernel_size": (3, 4), "padding": "same"}, (0, 0), [1, 2, 1, 1]),
        ({"kernel_size": 4, "padding": "same", "padding_mode": "reflect"}, (0, 0), [1, 2, 1, 2]),
        ({"kernel_size": 3, "padding": (0, 1), "padding_mode": "circular"}, (0, 0), [1, 1, 0, 0]),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "groups": 8}, (0, 0), [1, 1, 1, 1]),
    ],
)
def test_paddings_become_numbers_or_stand_in_front(
    keys: dict[str, object], padding: tuple[int, int], amounts: list[int] | None
) -> None:
    layer = quantized(**keys)
    plain, in_front = plain_layer_of(layer)
    assert type(plain) is nn.Conv2d and plain.padding == padding and plain.weight is layer.weight
    assert amounts == (None if in_front is None else in_front.amounts)
    x = torch.randn(2, 8, 9, 9)
    wanted = layer.float_forward(x)
    assert torch.equal(plain(x if in_front is None else in_front(x)), wanted)
    assert isinstance(layer, QuantizedLayer) and layer.padding == keys["padding"] or layer.padding == (1, 1)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_integers_are_padded_as_what_they_stand_for(mode: str) -> None:
    padding = Padding([(1, 2), (0, 1)], mode)
    x = torch.quantize_per_tensor(torch.randn(1, 2, 5, 5), 0.03, 100, torch.quint8)
    assert torch.equal(padding(x).dequantize(), padding(x.dequantize()))
    assert (padding(x).q_scale(), padding(x).q_zero_point()) == (x.q_scale(), x.q_zero_point())


def test_reasons_to_simulate_a_layer() -> None:
    layer = quantized(kernel_size=3)
    x = torch.randn(2, 8, 9, 9)
    assert reason_to_simulate(layer, [((x,), {}), ((), {"input": x})], "qnnpack") == ""
    assert "not called" in reason_to_simulate(layer, [], "qnnpack")
    assert "without a batch" in reason_to_simulate(layer, [((x[0],), {})], "qnnpack")
    assert "more than a tensor" in reason_to_simulate(layer, [((x, [9, 9]), {})], "qnnpack")
    layer.register_forward_hook(lambda *_: None)
    assert "hooks" in reason_to_simulate(layer, [((x,), {})], "qnnpack")
    padded = calibrated(row(Padded(8, 8, 3))).model[2]
    assert "a forward of its own" in reason_to_simulate(padded, [((x,), {})], "qnnpack")


# Whole networks


class Outside(nn.Module):
    """What a layer gives is read by a ReLU, and by a layer as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act, self.keep = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.cat([self.keep(x), self.head(self.act(x))], 1)


class OneReLU(nn.Module):
    """One ReLU behind a layer, and behind something else."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act, self.head = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.pool(self.head(self.act(self.stem(x)))))


class Parsed(nn.Module):
    """Reads of each layer where its input is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = row(nn.Conv2d(8, 8, 3, padding="same"))
        for layer in self.layers:
            layer.f = -1

    def forward(self, x: Tensor) -> Tensor:
        made = [x]
        for layer in self.layers:
            made.append(layer(input=made[layer.f]))
        return made[-1]


@pytest.mark.parametrize("preset", ["w8a8", "w4a4"])
@pytest.mark.parametrize("make", [Outside, OneReLU, Parsed])
def test_a_rectifier_is_fused_where_nothing_else_is_read(make: Make, preset: str) -> None:
    result = calibrated(make(), preset)
    bound = 0.03 if preset == "w8a8" else 0.2
    assert in_fx(result)[0] < bound and in_eager(result)[0] < bound


def hooked() -> nn.Module:
    model = row(nn.Conv2d(8, 8, 3))
    model[2].register_forward_hook(lambda _, args, output: output * 0.5)
    return model


@pytest.mark.parametrize(
    ("make", "name"),
    [(lambda: row(Padded(8, 8, 3)), "2"), (lambda: row(Standardized(8, 8, 3)), "2"), (hooked, "2")],
)
def test_what_is_not_carried_runs_as_it_was_calibrated(make: Make, name: str, caplog: pytest.LogCaptureFixture) -> None:
    result = calibrated(make())
    with caplog.at_level(logging.WARNING):
        found, simulated = in_fx(result)
    assert found < 0.02 and list(simulated) == [name] and f"do not carry {name!r}" in caplog.text
    found, converted = in_eager(result)
    assert found < 0.03
    assert sum(isinstance(module, nnq.Conv2d) for module in converted.modules()) == 2  # the stem and the head


def test_the_record_tells_what_was_not_carried() -> None:
    hosted = quantize_network(settle(row(Padded(8, 8, 3)), 12), batches(), RepAPQConfig(steps=0))
    assert "do not carry '2' (it has a forward of its own)" in hosted.result.notes[-1]
    plain = quantize_network(settle(row(nn.Conv2d(8, 8, 3)), 12), batches(), RepAPQConfig(steps=0))
    assert not plain.result.notes


def test_a_graph_with_other_forwards_is_written_as_onnx(tmp_path: object) -> None:
    result = calibrated(row(Padded(8, 8, 3)), "w4a4")
    prepared = torch_ao.prepare_learned(result, (batches()[0],), batches())
    network = torch_ao.quantized_network(prepared)
    with torch.no_grad():
        assert torch.equal(network(batches()[0]), result.model(batches()[0]))
    assert export_onnx(network, batches()[0], f"{tmp_path}/graph.onnx").integer_layers == 3


def test_half_a_network_takes_halves_and_floats() -> None:
    model = settle(row(nn.Conv2d(8, 8, 3)), 12).half()
    halves = [x.half() for x in batches()]
    result = quantize_model(model, halves, RepAPQConfig(steps=0, reduce_range=True))
    prepared = torch_ao.prepare_learned(result, (halves[0],), halves)
    converted = torch_ao.convert_to_int8(prepared)
    with torch_ao.integer_engine(prepared.meta[ENGINE]), torch.no_grad():
        assert torch.equal(converted(halves[0]), converted(own_batch(halves[0])))


def test_data_stay_what_they_were() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = row(nn.Conv2d(8, 8, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.sub_(0.5))

    data, result = batches(), calibrated(InPlace())
    torch_ao.prepare_learned(result, (data[0],), data)
    assert all(torch.equal(a, b) for a, b in zip(data, batches(), strict=True))
    with pytest.raises(HostError, match="'module' cannot run on integers"):
        torch_ao.prepare_learned_eager(result, data)
    assert all(torch.equal(a, b) for a, b in zip(data, batches(), strict=True))


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.flip(1)


class Stubbed(nn.Module):
    """Stubs around what has integer kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant, self.body, self.sum = QuantStub(), DeQuantStub(), row(Padded(8, 8, 3)), Sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.sum(self.dequant(self.body(self.quant(x))))


def test_what_has_no_integer_kernel_is_named_and_may_stand_outside_the_stubs() -> None:
    with pytest.raises(HostError, match=r"(?s)'module.2' cannot run on integers.*Use prepare_learned"):
        in_eager(calibrated(row(Sum(), nn.Conv2d(8, 8, 3))))
    assert in_fx(calibrated(row(Sum(), nn.Conv2d(8, 8, 3))))[0] < 0.02
    assert in_eager(calibrated(Stubbed()))[0] < 0.03
