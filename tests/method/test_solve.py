"""Solved weights: the least-squares problem, its rounding, and a whole stage solved unit after unit."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from repapq_plugin.backend import OwnBackend, OwnQuantizer
from repapq_plugin.config import RepAPQConfig
from repapq_plugin.job import Job, quantize_model
from repapq_plugin.method import solve
from repapq_plugin.method.sites import WeightSite
from repapq_plugin.method.solve import Moments, ProductInputs, Seen, solve_layer
from repapq_plugin.method.solve_units import solvable
from repapq_plugin.quantizers.fake_quantize import PerChannelLearnableFakeQuantize
from tests.support.comparing import outputs_of
from tests.support.networks import Chain, Pyramid, batches, settle

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, stride=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=(1, 0), stride=(2, 1), dilation=(1, 2)), (3, 4, 8, 7)),
    "conv2d, same": (lambda: nn.Conv2d(4, 4, 4, padding="same"), (2, 4, 6, 6)),
    "conv2d, groups": (lambda: nn.Conv2d(6, 9, 3, groups=3), (2, 6, 6, 6)),
    "conv2d, depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding=1), (2, 6, 5, 5)),
    "conv2d, mirrored": (lambda: nn.Conv2d(4, 5, 3, padding=2, padding_mode="reflect"), (2, 4, 6, 6)),
    "conv2d, one image": (lambda: nn.Conv2d(4, 5, 3), (4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 2, 4, 3, 3)),
}
named = pytest.mark.parametrize("name", LAYERS)
seeds = st.integers(0, 2**32 - 1)


def made(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    layer, shape = LAYERS[name]
    return layer(), torch.randn(*shape)


def seen_by(layer: nn.Module, x: Tensor) -> list[Seen]:
    with ProductInputs(layer) as watch, torch.no_grad():
        layer(x)
    return watch.found


def quantizer_of(layer: nn.Module, bits: int) -> OwnQuantizer:
    high = 2 ** (bits - 1) - 1
    quantizer = OwnQuantizer(PerChannelLearnableFakeQuantize(quant_min=-high, quant_max=high))
    quantizer.fake_quantize.enable_observer(False)
    scale = layer.weight.detach().flatten(1).abs().amax(1) / high
    quantizer.set_qparams(scale, torch.zeros_like(scale))
    return quantizer


@named
def test_what_is_seen_times_the_weight_is_the_output(name: str) -> None:
    layer, x = made(name)
    [seen] = seen_by(layer, x)
    groups = seen.values.shape[0]
    with torch.no_grad():
        product = layer.weight.reshape(groups, -1, seen.values.shape[1]) @ seen.values
        wanted = layer(x)
    axis = -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.dim()
    wanted = wanted.movedim(axis, 0).flatten(1)
    assert torch.allclose(product.flatten(0, 1) + layer.bias[:, None], wanted, atol=1e-5)
    assert len(seen.samples) == seen.values.shape[-1]
    assert set(seen.samples.tolist()) == set(range(1 if name == "conv2d, one image" else len(x)))


@named
@pytest.mark.parametrize("bits", [2, 4])
def test_solved_weights_lie_on_the_grid_and_do_no_worse_than_the_nearest(name: str, bits: int) -> None:
    layer, x = made(name)
    teacher, _ = made(name)
    quantizer = quantizer_of(layer, bits)
    noisy = x + 0.1 * torch.randn_like(x)
    pairs = list(zip(seen_by(layer, noisy), seen_by(teacher, x), strict=True))
    moments = Moments.of(pairs)
    assert moments is not None
    wanted = teacher(x).detach()
    nearest = quantizer.module(layer.weight.detach())
    with torch.no_grad():
        solve_layer(layer, teacher, quantizer, moments)
        assert torch.equal(quantizer.module(layer.weight), layer.weight)
        found = layer(noisy)
        layer.weight.copy_(nearest)
        layer.bias.copy_(teacher.bias)
        rounded = layer(noisy)
    assert (found - wanted).square().mean() <= (rounded - wanted).square().mean() * 1.05


def test_correlated_inputs_gain_much() -> None:
    torch.manual_seed(0)
    layer, teacher = (nn.Linear(64, 16) for _ in range(2))
    layer.load_state_dict(teacher.state_dict())
    x = torch.randn(4, 256, 8) @ torch.randn(8, 64)
    quantizer = quantizer_of(layer, 3)
    wanted, nearest = teacher(x), nn.functional.linear(x, quantizer.module(layer.weight), layer.bias)
    moments = Moments.of(zip(seen_by(layer, x), seen_by(teacher, x), strict=True))
    assert moments is not None
    solve_layer(layer, teacher, quantizer, moments)
    assert (layer(x) - wanted).square().mean() < 0.2 * (nearest - wanted).square().mean()


@named
def test_means_are_met(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "_weights", lambda seen: torch.ones(seen.values.shape[-1]))
    layer, x = made(name)
    teacher, _ = made(name)
    moments = Moments.of(zip(seen_by(layer, 2 * x + 1), seen_by(teacher, x), strict=True))
    assert moments is not None
    solve_layer(layer, teacher, quantizer_of(layer, 3), moments)
    axis = -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.dim()
    with torch.no_grad():
        found, wanted = (y.movedim(axis, 0).flatten(1).mean(1) for y in (layer(2 * x + 1), teacher(x)))
    assert torch.allclose(found, wanted, atol=1e-5)


@given(seed=seeds)
def test_weights_on_the_grid_stay_where_inputs_are_the_same(seed: int) -> None:
    layer, x = made("conv2d", seed)
    quantizer = quantizer_of(layer, 4)
    with torch.no_grad():
        layer.weight.copy_(quantizer.module(layer.weight))
    teacher, _ = made("conv2d", seed)
    teacher.load_state_dict(layer.state_dict())
    moments = Moments.of(zip(seen_by(layer, x), seen_by(teacher, x), strict=True))
    assert moments is not None
    solve_layer(layer, teacher, quantizer, moments)
    assert torch.allclose(layer.weight, teacher.weight, atol=1e-6)
    assert torch.allclose(layer.bias, teacher.bias, atol=1e-5)


def test_dead_inputs_and_a_missing_bias_do_no_harm() -> None:
    torch.manual_seed(0)
    layer, teacher = (nn.Conv2d(4, 4, 3, bias=False) for _ in range(2))
    teacher.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 8, 8)
    x[:, 1] = 0
    for batch in (x, torch.zeros_like(x)):
        moments = Moments.of(zip(seen_by(layer, batch), seen_by(teacher, batch), strict=True))
        assert moments is not None
        solve_layer(layer, teacher, quantizer_of(teacher, 4), moments)
        assert layer.weight.isfinite().all() and layer.bias is None


@pytest.mark.parametrize("positions", [1, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_inputs_that_never_change_do_no_harm(positions: int, bias: bool) -> None:
    for seed in range(10):  # rounding leaves a little more than nothing of what the mean takes, or a little less
        torch.manual_seed(seed)
        layer, x = nn.Conv2d(3, 4, 1, bias=bias), 300 * torch.randn(1, 3, 1, 1).expand(positions, 3, 1, 1)
        before, quantizer = layer.weight.detach().clone(), quantizer_of(layer, 4)
        teacher = copy.deepcopy(layer)
        moments = Moments.of(zip(seen_by(layer, x), seen_by(teacher, x), strict=True))
        assert moments is not None
        solve_layer(layer, teacher, quantizer, moments)
        with torch.no_grad():
            hat = quantizer.module(layer.weight)
            error = (functional.conv2d(x, hat, layer.bias) - teacher(x)).abs().max()
        assert error <= 1e-2 if bias else hat.isfinite().all()
        assert (layer.weight - before).abs().amax() <= before.abs().amax() / 7 + 1e-6


def test_a_large_batch_is_thinned_in_both_networks_alike() -> None:
    layer, _ = made("conv2d, depthwise")
    x = torch.randn(64, 6, 32, 32)
    one, other = (seen_by(layer, value)[0] for value in (x, x + 0.5))
    assert one.values.shape[-1] == solve.POSITIONS
    assert torch.equal(one.samples, other.samples)
    assert len(set(one.samples.tolist())) > 8


def test_nothing_seen_is_nothing_to_solve() -> None:
    layer, _ = made("linear")
    assert Moments.of([]) is None
    assert Moments.of(zip(seen_by(layer, torch.zeros(0, 6)), seen_by(layer, torch.zeros(0, 6)), strict=True)) is None


def test_what_cannot_be_solved_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, tied = nn.Linear(70, 2), nn.Linear(6, 4)
    twin = nn.Linear(6, 4)
    twin.weight = tied.weight
    transposed = nn.ConvTranspose2d(4, 4, 2)
    layers = {"wide": wide, "tied": tied, "twin": twin, "up": transposed, "plain": nn.Linear(6, 4)}
    monkeypatch.setattr("repapq_plugin.method.solve_units.MAX_INPUTS", 64)
    sites = {name: WeightSite(name, layer, quantizer_of(layer, 4), layer.forward) for name, layer in layers.items()}
    assert list(solvable(sites)) == ["plain"]


def config(**keys: object) -> RepAPQConfig:
    return RepAPQConfig.from_preset("w4a4", **{"steps": 0, "solve": True, "first_last_bits": None, **keys})


@pytest.mark.parametrize("schedule", ["unit", "stage", "network"])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("network", [Chain, Pyramid])
def test_a_job_solves_every_unit_and_keeps_what_is_better(network: type[nn.Module], steps: int, schedule: str) -> None:
    model, data = settle(network()), batches()
    ranges = quantize_model(model, data, config(solve=False))
    solved = quantize_model(model, data, config(steps=steps, schedule=schedule))
    assert len(solved.units) == len(list(dict.fromkeys(unit.name for unit in solved.units)))
    assert all(unit.loss_after <= unit.loss_before for unit in solved.units if not steps)
    assert any(unit.kept for unit in solved.units)
    x = batches(1)[0]

    def error(quantized: nn.Module) -> float:
        pairs = zip(outputs_of(quantized, x), outputs_of(model, x), strict=True)
        return sum(float((a - b).square().mean()) for a, b in pairs)

    assert error(solved.model) < error(ranges.model)


def test_a_unit_that_gets_worse_keeps_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(layer: nn.Module, *_: object) -> None:
        with torch.no_grad():
            layer.weight.zero_()

    monkeypatch.setattr("repapq_plugin.method.solve_units.solve_layer", spoil)
    result = Job(OwnBackend(), config()).run(settle(Chain()), batches())
    assert not any(unit.kept for unit in result.units)
    assert all("solved weights: held-out loss went from" in unit.note for unit in result.units)
    assert all(unit.loss_after == unit.loss_before for unit in result.units)
