"""Models and data that are no chain of blocks over equal batches: the right result, or an error that says why."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import pytest
import torch
from torch import Tensor, nn

from repapq_plugin import CalibrationResult, RepAPQConfig, quantize_model
from repapq_plugin.core.running import seeded
from repapq_plugin.errors import CalibrationError
from repapq_plugin.quantizers.layers import QuantizedLayer
from tests.support.networks import TwoBranchBlock, settle

slow = pytest.mark.slow

# Of the schedules, the quick tests run one.
schedules = pytest.mark.parametrize(
    "schedule", [pytest.param("unit", marks=slow), "stage", pytest.param("network", marks=slow)]
)


@dataclass
class Levels:
    fine: Tensor
    coarse: Tensor


class NamedLevels(NamedTuple):
    fine: Tensor
    coarse: Tensor


FORMS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "tuple": lambda fine, coarse: (fine, coarse),
    "list of tuples": lambda fine, coarse: [(fine,), (coarse,)],
    "dict": lambda fine, coarse: {"fine": fine, "coarse": coarse},
    "named tuple": NamedLevels,
    "dataclass": Levels,
}


def parts(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Levels):
        return [output.fine, output.coarse]
    values = output.values() if isinstance(output, dict) else cast("list[object]", output)
    return [tensor for value in values for tensor in parts(value)]


class Backbone(nn.Module):
    """Two levels, returned in one of the forms."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.stem, self.fine, self.coarse = TwoBranchBlock(3, 8, 2), TwoBranchBlock(8, 8), TwoBranchBlock(8, 8, 2)
        self.form = FORMS[form]

    def forward(self, x: Tensor) -> object:
        fine = self.fine(self.stem(x))
        return self.form(fine, self.coarse(fine))


class SharedHead(nn.Module):
    """A tower and a prediction layer that every level goes through, with norms of each level's own."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.predict = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 4, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))

    def forward(self, levels: object) -> list[Tensor]:
        return [self.predict(norm(self.tower(x)).relu()) for x, norm in zip(parts(levels), self.norms, strict=True)]


class Detector(nn.Module):
    def __init__(self, inner: str = "tuple", outer: str = "tuple") -> None:
        super().__init__()
        self.backbone, self.head, self.form = Backbone(inner), SharedHead(), FORMS[outer]

    def forward(self, x: Tensor) -> object:
        return self.form(*self.head(self.backbone(x)))


class Twice(nn.Module):
    """One convolution called twice in a row, and a block that stands under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again = TwoBranchBlock(3, 8, 2), nn.Conv2d(8, 8, 3, 1, 1)
        self.block = TwoBranchBlock(8, 8)
        self.same_block = self.block
        self.fc = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.again(self.stem(x)).relu()).relu()
        return self.fc(self.same_block(self.block(x)))


def images(*sizes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(size) for size in sizes]


def quantized(model: nn.Module, data: list[Tensor], preset: str = "w8a8", **keys: object) -> CalibrationResult:
    return quantize_model(model, data, RepAPQConfig.from_preset(preset, **{"steps": 6, **keys}))


def relative(result: CalibrationResult, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        pairs = list(zip(parts(result.model(x)), parts(model(x)), strict=True))
    return max(float((a - b).abs().mean() / b.abs().mean()) for a, b in pairs)


def settled(model: nn.Module) -> nn.Module:
    settle(model)
    return model.eval()


@schedules
def test_a_head_shared_by_levels_is_quantized_once_and_serves_all(schedule: str) -> None:
    model, data = settled(Detector()), images(*[(4, 3, 16, 16)] * 4)
    result = quantized(model, data, schedule=schedule)
    assert result.plan.float_layers == {}
    assert {"head.tower", "head.predict"} <= result.plan.layers.keys()
    assert sum(isinstance(module, QuantizedLayer) for module in result.model.modules()) == 5
    assert relative(result, model, data[0]) < 0.05


@schedules
def test_modules_called_twice_stay_one_module(schedule: str, tmp_path: Path) -> None:
    model, data = settled(Twice()), images(*[(4, 3, 16, 16)] * 4)
    result = quantized(model, data, schedule=schedule)
    assert result.model.same_block is result.model.block
    assert sum(isinstance(module, QuantizedLayer) for module in result.model.modules()) == 4
    assert relative(result, model, data[0]) < 0.05
    loaded = CalibrationResult.load(result.save(tmp_path / "twice.safetensors"), model)
    assert torch.equal(loaded.model(data[0]), result.model(data[0]))


@functools.cache
def quantized_tuples() -> tuple[nn.Module, list[Tensor], CalibrationResult]:
    """A detector that returns tuples, its data, and what became of it; made once."""
    with seeded(0):
        data = images(*[(4, 3, 16, 16)] * 2)
    with seeded(1):
        model = settled(Detector())
    return model, data, quantized(model, data, "w4a4")


@pytest.mark.parametrize(("inner", "outer"), list(zip(FORMS, [*list(FORMS)[2:], *list(FORMS)[:2]], strict=True)))
def test_whatever_form_outputs_have_the_numbers_are_the_same(inner: str, outer: str) -> None:
    plain, data, wanted = quantized_tuples()
    model = Detector(inner, outer)
    model.load_state_dict(plain.state_dict())
    result = quantized(model.eval(), data, "w4a4")
    assert type(result.model(data[0])) is type(model(data[0]))
    assert {name: bits for name, bits in result.plan.layers.items()} == dict(wanted.plan.layers)
    for a, b in zip(parts(result.model(data[0])), parts(wanted.model(data[0])), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("steps", [0, 6])
def test_images_of_differing_size_calibrate_together(steps: int) -> None:
    model, data = settled(Detector()), images((4, 3, 16, 16), (2, 3, 24, 16), (1, 3, 20, 28), (4, 3, 16, 16))
    result = quantized(model, data, steps=steps)
    assert max(relative(result, model, x) for x in data) < 0.05


@pytest.mark.parametrize("steps", [pytest.param(0, marks=slow), 6])
@pytest.mark.parametrize("place", [0, 2])
def test_a_batch_without_images_changes_nothing(steps: int, place: int) -> None:
    model, data = settled(Detector()), images(*[(4, 3, 16, 16)] * 3)
    data.insert(place, torch.zeros(0, 3, 16, 16))
    result = quantized(model, data, steps=steps)
    assert relative(result, model, data[1]) < 0.05
    assert not result.float_layers and (not steps or any(unit.kept for unit in result.units))
    assert result.notes[-1] == "1 of 4 batches hold no value and were left out."
    assert all(bool(tensor.isfinite().all()) for tensor in result.model.state_dict().values())


def test_batches_without_any_image_are_refused() -> None:
    model = settle(TwoBranchBlock(3, 8, 2))
    with pytest.raises(CalibrationError, match="No layer read a single value in 2 calibration batches"):
        quantize_model(model, [torch.zeros(0, 3, 16, 16)] * 2, RepAPQConfig(steps=1))
