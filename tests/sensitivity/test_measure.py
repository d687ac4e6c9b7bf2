"""One unit at a time is quantized; measurements are kept; the chosen bits are those that a calibration then gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from repapq_plugin import Progress, RepAPQConfig, quantize_model
from repapq_plugin.core.losses import relative_loss
from repapq_plugin.errors import CheckpointError, ConfigError
from repapq_plugin.merging import merge_for_inference
from repapq_plugin.sensitivity import Budget, Sensitivity, choose_bits, measure_sensitivity
from repapq_plugin.sensitivity.measure import relative_error
from repapq_plugin.sensitivity.plot import plot_sensitivity
from tests.support.networks import Chain, Pyramid, batches, settle

FREE = RepAPQConfig(first_last_bits=None, equalize=False, fold_constants=False)


@pytest.fixture
def data() -> list[Tensor]:
    torch.manual_seed(2)
    return batches(4)


def network(make: Callable[[], nn.Module] = Chain) -> nn.Module:
    torch.manual_seed(1)
    return settle(make())


def test_a_unit_alone_is_what_a_calibration_that_keeps_the_others_float_makes(data: list[Tensor]) -> None:
    model = network()
    found = measure_sensitivity(model, data, FREE, bits=[3, 8], batches=4)
    teacher = merge_for_inference(model, lambda net: net(data[0])).network
    layers = [name for unit in found.units for name in unit.options[0].layers]
    for unit in (found.units[0], found.units[3], found.units[-1]):
        others = tuple(name for name in layers if name not in unit.options[0].layers)
        config = FREE.replace(weight_bits=3, activation_bits=3, keep_float=others, steps=0)
        alone = quantize_model(model, data, config).model
        with torch.no_grad():
            noise = sum(float(relative_loss(alone(x), teacher(x), "mse")) for x in data) / len(data)
        assert unit.at((3, 3)).noise == pytest.approx(noise, rel=1e-3)


def test_every_value_of_an_output_weighs_alike() -> None:
    torch.manual_seed(3)
    large, small = torch.randn(4, 6, 8, 8), torch.randn(4, 6, 2, 2)
    off = small + 0.5 * torch.randn_like(small)
    parts = [float(relative_loss(got, wanted, "mse")) for got, wanted in ((large * 1.1, large), (off, small))]
    found = float(relative_error([large * 1.1, off, torch.empty(0)], [large, small, torch.empty(0)], "mse"))
    assert found == pytest.approx((64 * parts[0] + 4 * parts[1]) / 68, rel=1e-5)
    assert float(relative_error([torch.empty(0)], [torch.empty(0)], "mae")) == 0


def test_fewer_bits_do_more_damage_and_cost_less(data: list[Tensor]) -> None:
    found = measure_sensitivity(network(Pyramid), data, FREE, bits=["w2a8", 8, "4"])
    assert [option.bits for option in found.units[0].options] == [(2, 8), (4, 4), (8, 8)]
    for unit in found.units:
        two, four, eight = unit.options
        assert two.noise > eight.noise and four.noise > eight.noise and four.mae > eight.mae
        assert (two.weight_bits, four.weight_bits, eight.weight_bits) == (
            2 * unit.weights,
            4 * unit.weights,
            8 * unit.weights,
        )
        assert two.bit_operations == four.bit_operations == eight.bit_operations // 4
    top, option = found.ranking()[0]
    assert option.noise == max(option.noise for unit in found.units for option in unit.options)
    assert option.snr == pytest.approx(-10 * math.log10(option.noise))


def test_costs_are_those_of_the_network(data: list[Tensor]) -> None:
    model = network()
    found = measure_sensitivity(model, data, FREE, bits=[4, 8])
    teacher = merge_for_inference(model, lambda net: net(data[0])).network
    weights = [module.weight for module in teacher.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert found.weights == sum(weight.numel() for weight in weights)
    all_bytes = sum(t.numel() * t.element_size() for t in (*teacher.parameters(), *teacher.buffers()))
    assert found.other_bytes == all_bytes - 4 * found.weights
    side = data[0].shape[-1] // 2  # the stem has a stride of two
    stem, last = found.units[0].options[0], found.units[-1].options[0]
    assert stem.bit_operations == side * side * found.units[0].weights * 16
    assert last.bit_operations == found.units[-1].weights * 16
    assert found.uniform((8, 8)).size_bytes == found.other_bytes + found.weights


def test_a_chosen_assignment_is_a_configuration_that_gives_those_bits(data: list[Tensor]) -> None:
    model = network(Pyramid)
    found = measure_sensitivity(model, data, FREE)
    chosen, uniform = choose_bits(found, Budget(mean_bits=5)), found.uniform((5, 5))
    assert chosen.mean_bits <= 5 and chosen.noise < uniform.noise and len(set(chosen.bits.values())) > 1
    config = RepAPQConfig.from_dict({**FREE.to_dict(), "layer_bits": dict(chosen.layer_bits), "steps": 0})
    plan = quantize_model(model, data, config).plan
    assert {name: layer.bits for name, layer in plan.layers.items()} == dict(chosen.layer_bits)


def test_what_the_configuration_pins_stays_so(data: list[Tensor]) -> None:
    config = RepAPQConfig(layer_bits={"stages.1.*": (6, 7)})
    found = measure_sensitivity(network(), data, config, bits=[3, 4])
    pinned = {unit.name: unit.options[0].bits for unit in found.units if unit.pinned}
    assert pinned == {"stem": (8, 8), "stages.1.0": (6, 7), "stages.1.1": (6, 7), "fc": (8, 8)}
    low = found.uniform((3, 3)).layer_bits
    assert set(low.values()) == {(3, 3), (6, 7), (8, 8)}
    with pytest.raises(ConfigError, match="pin the bits of all units"):
        measure_sensitivity(network(), data, RepAPQConfig(layer_bits={"*": (6, 6)}))


class Tied(nn.Module):
    """Two layers with one weight, and one between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, 1, 1), nn.Conv2d(3, 3, 1)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x).relu()).relu())


def test_units_that_share_a_weight_get_one_number_of_bits_and_count_it_once(data: list[Tensor]) -> None:
    torch.manual_seed(0)
    found = measure_sensitivity(Tied().eval(), data, FREE, bits=[3, 8])
    assert [(unit.name, unit.weights) for unit in found.units] == [("first", 9), ("between", 81)]
    assert set(found.units[0].options[0].layers) == {"first", "last"}
    assert found.units[0].options[0].weight_bits == 27


class Stop(KeyboardInterrupt):
    """What interrupts."""


def test_measurements_are_kept_and_the_rest_ends_with_the_same_bits(data: list[Tensor], tmp_path: Path) -> None:
    scored: list[nn.Module] = []

    def score(model: nn.Module) -> dict[str, float]:
        scored.append(model)
        with torch.no_grad():
            return {"mean": float(model(data[0]).mean())}

    def stopping_at(count: int) -> Callable[[Progress], None]:
        def report(progress: Progress) -> None:
            if progress.phase == "sensitivity" and progress.done == count:
                raise Stop

        return report

    def measured(progress: Callable[[Progress], None] | None = None, **more: object) -> Sensitivity:
        keys = {"bits": [3, 4, 8], "evaluations": 3, "score": score, **more}
        return measure_sensitivity(network(), data, FREE, progress=progress, **keys)  # type: ignore[arg-type]

    wanted = measured()
    assert len(scored) == 3
    assert wanted.scores and sum(bool(o.scores) for _, o in wanted.ranking()) == 2
    worst = sorted(wanted.units, key=lambda unit: -unit.options[0].noise)
    assert [unit.name for unit in worst[:2]] == [unit.name for unit, option in wanted.ranking() if option.scores]
    for count in (3, 11):
        with pytest.raises(Stop):
            measured(stopping_at(count), checkpoint_dir=tmp_path / "kept", resume=count != 3)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("part-*")}
    assert len(kept) > 10
    with pytest.raises(CheckpointError, match="the bit widths was w3a3, w4a4, w8a8 and is w3a3, w8a8"):
        measured(checkpoint_dir=tmp_path / "kept", resume=True, bits=[3, 8])
    scored.clear()
    assert measured(checkpoint_dir=tmp_path / "kept", resume=True) == wanted
    assert scored == []
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"bits": [4]}, r"bits=\[4\] is not allowed; give at least two"),
        ({"bits": [4, "w4a4"]}, "give at least two"),
        ({"bits": [4, 9]}, "weight_bits=9 is not allowed"),
        ({"bits": [4, "w8"]}, "bits='w8' is not allowed; write a number of bits such as 4, or w4a8"),
        ({"batches": 0}, "batches=0 is not allowed; choose a whole number of at least 1"),
        ({"evaluations": 11}, "evaluations=11 is not allowed; choose a whole number from 0 to 10"),
        ({"evaluations": 1}, "evaluations=1 needs score"),
        ({"evaluations": 1, "score": lambda _: {"mAP": "good"}}, "score returned 'good', which is no number"),
        ({"resume": True}, "resume=True is not allowed without checkpoint_dir"),
    ],
)
def test_wrong_arguments_are_refused(keys: dict[str, object], message: str, data: list[Tensor]) -> None:
    with pytest.raises(ConfigError, match=message):
        measure_sensitivity(network(), data, FREE, **keys)  # type: ignore[arg-type]


def test_a_plot_is_written_by_its_suffix(data: list[Tensor], tmp_path: Path) -> None:
    found = measure_sensitivity(network(), data, FREE, bits=[3, 8])
    chosen = choose_bits(found, Budget(mean_bits=5))
    picture = plot_sensitivity(found, tmp_path / "a.svg", chosen).read_text()
    assert picture.startswith("<?xml") and "hatched: chosen" in picture
    assert "hatched" not in plot_sensitivity(found, tmp_path / "b.svg").read_text()
    assert plot_sensitivity(found, tmp_path / "a.png", chosen).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="'a.jpg' is not allowed; end it in .svg or .png"):
        plot_sensitivity(found, "a.jpg")
