"""Networks that work in place are quantized as those that compute the same out of place, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from repapq_plugin import CalibrationResult, RepAPQConfig, quantize_model
from repapq_plugin.errors import CalibrationError
from tests.support.in_place import PLACES, Net

CANNOT_LEARN_AS_A_WHOLE = "value, once it was read"
"""A gradient needs what was read as it was; a stage at once does not read what the other one changes."""


def data() -> list[Tensor]:
    return [torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def quantized(where: str, in_place: bool, **keys: object) -> CalibrationResult:
    torch.manual_seed(0)
    return quantize_model(Net(where, in_place).eval(), data(), RepAPQConfig.from_preset("w4a4", **keys))


def both_equal(where: str, **keys: object) -> None:
    mine, theirs = (quantized(where, in_place, **keys) for in_place in (True, False))
    assert mine.plan == theirs.plan and mine.float_layers == {}
    assert [unit.loss_after for unit in mine.units] == [unit.loss_after for unit in theirs.units]
    x = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        assert torch.equal(mine.model(x.clone()), theirs.model(x.clone()))


@pytest.mark.parametrize("where", PLACES)
def test_ranges_are_those_of_the_network_that_computes_out_of_place(where: str) -> None:
    both_equal(where, steps=0)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("schedule", ["stage", "unit"])
def test_so_is_what_is_learned(where: str, schedule: str) -> None:
    both_equal(where, steps=8, schedule=schedule)


@pytest.mark.parametrize("where", [where for where in PLACES if where != CANNOT_LEARN_AS_A_WHOLE])
def test_so_is_what_is_learned_as_a_whole(where: str) -> None:
    both_equal(where, steps=8, schedule="network")


@pytest.mark.parametrize("keys", [{"schedule": "network"}, {"network_steps": 2}])
def test_a_network_that_cannot_learn_as_a_whole_says_what_to_choose(keys: dict[str, object]) -> None:
    with pytest.raises(CalibrationError, match="cannot learn as a whole .*Choose schedule='stage' and network_steps=0"):
        quantized(CANNOT_LEARN_AS_A_WHOLE, True, steps=2, **keys)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_network_that_runs_without_gradients_only_is_refused_with_the_remedy(steps: int) -> None:
    with pytest.raises(CalibrationError, match="runs without gradients only .*without out="):
        quantized("value by out=", True, steps=steps)
    assert quantized("value by out=", False, steps=steps).float_layers == {}


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, :2])


def test_an_error_of_the_networks_own_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        quantize_model(Broken(), data(), RepAPQConfig(steps=0))
