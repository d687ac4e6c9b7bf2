"""Networks of layers with ways of their own, from the float network to the file: each computes what it did."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from repapq_plugin import CalibrationResult, RepAPQConfig, export_onnx, quantize_model
from repapq_plugin.core.tensors import floating_tensors
from repapq_plugin.export.deploy import DeployedLayer, deployable, without_quantizers
from repapq_plugin.policy import NO_CHANNEL_AXIS
from repapq_plugin.quantizers.layers import BakedLayer, QuantizedLayer
from tests.support.networks import Tied, TwoBranchBlock
from tests.support.own_layers import BiasApart, ByMatmul, FromInput, Padded, Scaled, Standardized, Twice

# Each is a whole job, saved, loaded and exported. `quantizers/` and `export/` test the same layers one step at a time.
pytestmark = pytest.mark.slow


@dataclass
class Case:
    """A network that has settled, its calibration batches, and what became of it.

    Args:
        model: The float network.
        data: Calibration batches.
        result: What `quantize_model` returned.
        folder: Where files go.
    """

    model: nn.Module
    data: list[Tensor]
    result: CalibrationResult
    folder: Path

    def loaded(self) -> CalibrationResult:
        return CalibrationResult.load(self.result.save(self.folder / "result.safetensors"), self.model)


Make = Callable[..., Case]


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return floating_tensors(model(x))


def same(some: nn.Module, other: nn.Module, x: Tensor) -> bool:
    return all(torch.equal(a, b) for a, b in zip(outputs(some, x), outputs(other, x), strict=True))


def error(case: Case) -> float:
    """Largest mean error of an output of an image that was not calibrated on, relative to its mean size."""
    unseen = torch.randn_like(case.data[0])
    pairs = zip(outputs(case.result.model, unseen), outputs(case.model, unseen), strict=True)
    found = 0.0
    for got, wanted in pairs:
        assert got.shape == wanted.shape
        found = max(found, float((got - wanted).abs().mean() / wanted.abs().mean()))
    return found


@pytest.fixture
def quantized(tmp_path: Path) -> Iterator[Make]:
    """Quantize a network; afterwards it must have stayed what it was, and every form of it must agree to the bit."""
    cases: list[tuple[Case, nn.Module]] = []

    def make(model: nn.Module, preset: str = "w8a8", size: int = 16, **keys: object) -> Case:
        data = [torch.randn(4, 3, size, size) for _ in range(4)]
        with torch.no_grad():
            for x in data * 3:
                model.train()(x)
        before = copy.deepcopy(model.eval())
        config = RepAPQConfig.from_preset(preset, **{"steps": 6, **keys})
        case = Case(model, data, quantize_model(model, data, config), tmp_path)
        cases.append((case, before))
        return case

    yield make
    for case, before in cases:
        x = torch.randn_like(case.data[0])
        model = case.result.model
        assert same(case.model, before, x)
        assert same(case.loaded().model, model, x)
        assert same(copy.deepcopy(model), model, x)
        assert same(deployable(model), model, x)
        assert same(deployable(case.loaded().model), model, x)
        # One node after the other the file computes what the network does.
        assert export_onnx(case.result, x[:2], tmp_path / "model.onnx").max_rel_difference < 1e-4


STEPS = pytest.mark.parametrize("steps", [0, 6])


@STEPS
@pytest.mark.parametrize("size", [16, 15])
def test_layers_that_pad_as_their_input_asks_for_are_quantized_with_that(
    quantized: Make, steps: int, size: int
) -> None:
    layers = (Padded(3, 8, 3, stride=2), nn.ReLU(), Padded(8, 8, 5, stride=2, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    case = quantized(nn.Sequential(*layers), steps=steps, size=size)
    assert list(case.result.layers) == ["0", "2", "4"] and not case.result.float_layers
    assert isinstance(case.result.model[0], Padded) and isinstance(case.result.model[0], QuantizedLayer)
    assert error(case) < 0.05


@STEPS
@pytest.mark.parametrize("kind", [Standardized, Scaled])
def test_weights_that_a_forward_makes_are_quantized_as_they_are_multiplied(
    quantized: Make, kind: type[nn.Conv2d], steps: int
) -> None:
    layers = (kind(3, 8, 3, stride=2, padding=1), nn.ReLU(), kind(8, 8, 3, padding=1, bias=False), nn.ReLU())
    case = quantized(nn.Sequential(*layers, nn.Conv2d(8, 4, 1)), preset="w8a8", steps=steps)
    result = case.result
    assert list(result.layers) == ["0", "2", "4"] and not result.float_layers
    assert result.plan.baked == ("0", "2") == case.loaded().plan.baked
    assert error(case) < 0.05
    floats = without_quantizers(result.model)
    assert isinstance(floats[0], BakedLayer) and isinstance(floats[0], kind)
    for name in result.layers:  # the weights lie on their grid, and that is what is multiplied
        layer = cast(QuantizedLayer, result.model.get_submodule(name))
        assert torch.equal(layer.weight_fake_quant(layer.weight), layer.weight)
        assert isinstance(deployable(result.model).get_submodule(name), DeployedLayer)


class TiedAndMade(nn.Module):
    """One weight of two layers that make what they multiply of it, and of a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.plain = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.one, self.other = Standardized(8, 8, 3, padding=1), Scaled(8, 8, 3, padding=1)
        self.one.weight = self.other.weight = self.plain.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.stem(x).relu()
        return self.plain(x), self.one(x), self.other(x)


def test_what_layers_make_of_one_weight_are_weights_of_their_own(quantized: Make) -> None:
    case = quantized(TiedAndMade())
    assert case.result.plan.baked == ("one", "other") and not case.result.float_layers
    for model in (case.result.model, case.loaded().model):
        assert len({id(model.get_submodule(name).weight) for name in ("plain", "one", "other")}) == 3
    assert error(case) < 0.05


def test_a_norm_behind_a_standardized_convolution_is_folded_into_what_that_multiplies(quantized: Make) -> None:
    layers = (Standardized(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    case = quantized(nn.Sequential(*layers))
    assert case.result.plan.folded == (("0", "1"),) and case.result.plan.baked == ("0",)
    assert error(case) < 0.05


def test_forwards_that_cannot_be_quantized_stay_float_with_the_reason_and_the_rest_is_quantized(
    quantized: Make,
) -> None:
    odd = (Twice(8, 8, 3, padding=1), BiasApart(8, 8, 1), FromInput(8, 8, 1), ByMatmul(16, 16))
    case = quantized(nn.Sequential(nn.Conv2d(3, 8, 1), *odd, nn.Conv2d(8, 4, 1)))
    assert list(case.result.layers) == ["0", "5"]
    assert list(case.result.float_layers) == ["1", "2", "3", "4"]
    for layer, reason in zip(odd, case.result.float_layers.values(), strict=True):
        assert reason.startswith(f"the forward of {type(layer).__name__} ")
    assert error(case) < 0.05


@STEPS
@pytest.mark.parametrize("schedule", ["unit", "stage", "network"])
def test_one_weight_of_two_layers_stays_one_weight_on_one_grid(quantized: Make, schedule: str, steps: int) -> None:
    torch.manual_seed(0)
    model = Tied()
    case = quantized(model, "w4a8", schedule=schedule, steps=steps)
    for result in (case.result, case.loaded()):
        fine, coarse = (cast(QuantizedLayer, result.model.get_submodule(name)) for name in ("fine", "coarse"))
        assert fine.weight is coarse.weight and fine.weight_fake_quant is coarse.weight_fake_quant
        assert fine.bias is not coarse.bias and fine.input_fake_quant is not coarse.input_fake_quant
        assert torch.equal(fine.weight_fake_quant(fine.weight), fine.weight)
    # The head of the coarse level is a last layer, with 8 bits; the one weight needs them in the other as well.
    assert case.result.layers["fine"] == (8, 8) and case.result.layers["coarse"] == (8, 8)
    assert error(case) < 0.1


def test_before_anything_learns_one_weight_is_worth_as_much_as_two_equal_ones(quantized: Make) -> None:
    apart = Tied()
    apart.coarse.weight = nn.Parameter(apart.fine.weight.detach().clone())
    tied = Tied()
    tied.load_state_dict(apart.state_dict())
    state = torch.random.get_rng_state()
    one = quantized(tied, "w4a8", steps=0)
    torch.random.set_rng_state(state)
    two = quantized(apart, "w4a8", steps=0, layer_bits={"fine": (8, 8)})
    assert two.result.layers == one.result.layers
    assert same(one.result.model, two.result.model, torch.randn(2, 3, 16, 16))


class Resized(nn.Module):
    """A transposed convolution with a norm, called as the size of the image asks for."""

    def __init__(self, groups: int, call: str) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 8, 3, 2, 1, groups=groups, bias=False)
        self.norm, self.out, self.call = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), call

    def forward(self, x: Tensor) -> Tensor:
        y, size = self.down(x).relu(), list(x.shape[2:])
        if self.call == "keyword":
            y = self.up(y, output_size=size)
        elif self.call == "keywords":
            y = self.up(output_size=size, input=y)
        else:
            y = self.up(y, size) if self.call == "position" else self.up(y)
        return self.out(self.norm(y).relu())


@pytest.mark.parametrize("call", ["plain", "position", "keyword", "keywords"])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_transposed_convolution_is_called_with_an_output_size(quantized: Make, groups: int, call: str) -> None:
    case = quantized(Resized(groups, call))
    assert len(case.result.plan.folded) == 1
    assert case.result.float_layers == ({} if groups == 1 else {"up": NO_CHANNEL_AXIS})
    assert error(case) < 0.05


PADDINGS: dict[str, dict[str, object]] = {
    "same": {"kernel_size": 3, "padding": "same"},
    "same, even kernel": {"kernel_size": 4, "padding": "same"},
    "same, dilated": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": (0, 1), "padding_mode": "circular"},
    "replicate, depthwise": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "groups": 8},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", PADDINGS)
def test_paddings_given_by_name_and_by_mode(quantized: Make, name: str) -> None:
    middle = nn.Conv2d(8, 8, **PADDINGS[name])  # type: ignore[arg-type]
    case = quantized(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), middle, nn.ReLU(), nn.Conv2d(8, 4, 1)))
    assert len(case.result.layers) == 3
    assert error(case) < 0.05


class Listed(nn.Module):
    """Walks a list of layers and asks each from where it reads: the way of YOLO's configurations."""

    def __init__(self) -> None:
        super().__init__()
        layers = (
            (-1, nn.Conv2d(3, 8, 3, 2, 1)),
            (-1, nn.ReLU()),
            (-1, Padded(8, 8, 3, stride=2)),
            (-1, TwoBranchBlock(8, 8)),
            (-1, nn.Upsample(scale_factor=2)),
            ([-1, 1], nn.Identity()),  # stands for a sum
            (-1, Standardized(8, 4, 1)),
        )
        for place, (source, layer) in enumerate(layers):
            layer.f, layer.i = source, place  # type: ignore[assignment]
        self.model = nn.ModuleList(layer for _, layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        for layer in self.model:
            source = cast("int | list[int]", layer.f)
            x = seen[source[0]] + seen[source[1]] if isinstance(source, list) else layer(x)
            seen.append(x)
        assert [layer.i for layer in self.model] == list(range(len(seen)))
        return x


@STEPS
def test_layers_keep_what_their_network_reads_of_them(quantized: Make, steps: int) -> None:
    case = quantized(Listed(), steps=steps)
    assert [record.merged for record in case.result.merges] == [True] and not case.result.float_layers
    assert [name.split(".")[1] for name in case.result.layers] == ["0", "2", "3", "6"]
    for model in (case.result.model, case.loaded().model, deployable(case.result.model)):
        layers = list(cast(nn.ModuleList, model.model))
        assert [layer.i for layer in layers] == list(range(7)) and layers[5].f == [-1, 1]
    assert error(case) < 0.05


class Tokens(nn.Module):
    """Convolutions over a volume and a signal, and linear layers with a norm behind them, one over flattened tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.signal, self.volume = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv1d(8, 8, 3), nn.Conv3d(2, 2, (1, 2, 1))
        self.mix, self.mix_norm = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8)
        self.fc, self.norm, self.out = nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.volume(x.reshape(len(x), 2, 4, *x.shape[2:])).relu().flatten(1, 2)
        x = self.mix(self.signal(x.flatten(2)).relu().transpose(1, 2))
        x = self.mix_norm(x.flatten(0, 1)).reshape_as(x).relu().mean(1)
        return self.out(self.norm(self.fc(x)).relu())


@STEPS
def test_convolutions_of_one_and_three_axes_are_quantized_and_a_norm_goes_into_a_linear_layer(
    quantized: Make, steps: int
) -> None:
    case = quantized(Tokens(), steps=steps)
    assert list(case.result.layers) == ["stem", "volume", "signal", "mix", "fc", "out"] and not case.result.float_layers
    assert set(case.result.plan.folded) == {("mix", "mix_norm"), ("fc", "norm")}
    assert error(case) < 0.06
