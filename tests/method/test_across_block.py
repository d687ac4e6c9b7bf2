"""The loss, and the stages in order: each behind its quantized prefix, against the float network."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.running import seeded
from repapq_plugin.errors import CalibrationError
from repapq_plugin.method.across_block import (
    AcrossBlockCalibrator,
    UnitResult,
    across_block_loss,
    mean_relative_loss,
    total_steps,
)
from repapq_plugin.method.cache import ActivationCache
from repapq_plugin.method.optimise import Outputs
from repapq_plugin.method.partition import Stage
from repapq_plugin.method.replay import inputs_of, recording
from repapq_plugin.method.schedules import Activation, Role
from repapq_plugin.method.stage_activations import Networks
from repapq_plugin.quantizers.layers import QuantizedLayer
from tests.support.comparing import equal
from tests.support.networks import Chain, Pyramid, batches, settle
from tests.support.placed import after, networks_of

slow = pytest.mark.slow

LOSSES = ("mae", "mse")
losses = st.sampled_from(LOSSES)
seeds = st.integers(0, 2**32 - 1)
shapes = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=4)


def drawn(shape: Sequence[Sequence[int]], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*size, generator=generator) for size in shape]


# -- the loss -----------------------------------------------------------------------------------------------------


@given(shape=shapes, seed=seeds, loss=losses)
def test_a_zero_output_has_a_relative_loss_of_one_and_an_equal_one_of_zero(
    shape: list[list[int]], seed: int, loss: str
) -> None:
    targets = drawn([[1, *size] for size in shape], seed)  # of one sample each
    zeros = [torch.zeros_like(target) for target in targets]
    assert float(mean_relative_loss(zeros, targets, loss)) == pytest.approx(1, rel=1e-5)
    assert float(mean_relative_loss(targets, targets, loss)) == 0


@given(shape=shapes, seed=seeds, loss=losses, exponent=st.integers(-8, 8))
def test_the_relative_loss_does_not_know_the_unit_of_its_tensors(
    shape: list[list[int]], seed: int, loss: str, exponent: int
) -> None:
    targets, outputs, factor = drawn(shape, seed), drawn(shape, seed + 1), 2.0**exponent
    scaled = mean_relative_loss([o * factor for o in outputs], [t * factor for t in targets], loss)
    assert float(scaled) == pytest.approx(float(mean_relative_loss(outputs, targets, loss)), rel=1e-5)


@given(shape=shapes, seed=seeds, loss=losses)
def test_each_tensor_counts_the_same_whatever_its_size(shape: list[list[int]], seed: int, loss: str) -> None:
    targets, outputs = drawn(shape, seed), drawn(shape, seed + 1)
    alone = [float(mean_relative_loss([o], [t], loss)) for o, t in zip(outputs, targets, strict=True)]
    assert float(mean_relative_loss(outputs, targets, loss)) == pytest.approx(sum(alone) / len(alone), rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_tensors_without_elements_are_left_out(loss: str) -> None:
    empty, target, output = torch.zeros(0, 3), torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(
        mean_relative_loss([empty, output], [empty, target], loss), mean_relative_loss([output], [target], loss)
    )
    assert float(mean_relative_loss([empty], [empty], loss)) == 0
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        mean_relative_loss([output, output], [target], loss)


def outputs_and_targets(seed: int = 0) -> tuple[Outputs, Outputs]:
    first, second, stage, *targets = drawn([[2, 3]] * 6, seed)
    outputs = [tensor.requires_grad_(True) for tensor in (first, second, stage)]
    return (
        Outputs({"one": outputs[:1], "two": outputs[1:2]}, outputs[2:]),
        Outputs({"one": targets[:1], "two": targets[1:2]}, targets[2:]),
    )


@given(seed=seeds, loss=losses, weight=st.floats(0, 10))
def test_the_loss_is_the_mean_of_the_units_and_the_weighted_stage(seed: int, loss: str, weight: float) -> None:
    outputs, targets = outputs_and_targets(seed)
    total, parts = across_block_loss(outputs, targets, loss=loss, stage_weight=weight)
    with torch.no_grad():
        wanted = {name: float(mean_relative_loss(outputs.units[name], targets.units[name], loss)) for name in parts}
        stage = float(mean_relative_loss(outputs.stage, targets.stage, loss))
    assert {name: part.item() for name, part in parts.items()} == wanted
    assert not any(part.requires_grad for part in parts.values())
    assert list(parts) == ["one", "two"]
    assert total.item() == pytest.approx(sum(wanted.values()) / 2 + weight * stage, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_of_each_term_reaches_its_outputs(loss: str) -> None:
    outputs, targets = outputs_and_targets()
    total, _ = across_block_loss(outputs, targets, loss=loss, stage_weight=1.0)
    reached = torch.autograd.grad(total, [outputs.units["one"][0], outputs.units["two"][0], outputs.stage[0]])
    assert all(bool((gradient != 0).all()) for gradient in reached)


@pytest.mark.parametrize("loss", LOSSES)
def test_without_weight_the_end_of_the_stage_supervises_nothing(loss: str) -> None:
    outputs, targets = outputs_and_targets()
    total, _ = across_block_loss(outputs, targets, loss=loss, stage_weight=0.0)
    assert torch.autograd.grad(total, [outputs.stage[0]], allow_unused=True) == (None,)
    alone, _ = across_block_loss(Outputs(outputs.units, []), Outputs(targets.units, []), loss=loss, stage_weight=1.0)
    assert torch.equal(total, alone)


# -- the stages ---------------------------------------------------------------------------------------------------


class Remembering(ActivationCache[Activation]):
    """A cache that goes on knowing what was last put into it."""

    def __init__(self) -> None:
        super().__init__(2**30)
        self.last: dict[tuple[Activation, int], list[Tensor]] = {}

    def put(self, name: Activation, batch: int, tensors: list[Tensor]) -> None:
        super().put(name, batch, tensors)
        self.last[name, batch] = [tensor.detach().clone() for tensor in tensors]

    def of(self, role: Role, module: str, batch: int) -> list[Tensor]:
        return self.last[Activation(role, module), batch]


def config(**keys: object) -> RepAPQConfig:
    return RepAPQConfig.from_preset("w4a4", **{"steps": 4, **keys})


def calibrator(
    model: nn.Module, settings: RepAPQConfig, count: int = 3
) -> tuple[AcrossBlockCalibrator, Remembering, list[int]]:
    """A calibrator ready to run, its cache, and the list to which each step adds an entry."""
    job, state = after("find_ranges", settle(model), batches(count), settings)
    cache, steps = Remembering(), list[int]()
    return (
        AcrossBlockCalibrator(networks_of(job, state), state.stages, settings, cache, lambda *_: steps.append(1)),
        cache,
        steps,
    )


def read_by(networks: Networks, model: nn.Module, name: str, batch: int) -> list[Tensor]:
    with torch.no_grad():
        module = model.get_submodule(name)
        return inputs_of(module, networks.calls(name), lambda: networks.forward_fn(model, networks.batches[batch]))


def returned_by(networks: Networks, model: nn.Module, name: str, batch: int) -> list[Tensor]:
    with torch.no_grad(), recording(dict(model.named_modules()), [name]) as outputs:
        networks.forward_fn(model, networks.batches[batch])
    return outputs[name]


@functools.cache
def finished(network: type[nn.Module], schedule: str) -> tuple[AcrossBlockCalibrator, Remembering, list[UnitResult]]:
    """A network that has learned by a schedule, with its cache and results: made once, for tests that only look."""
    with seeded(0):
        calibration, cache, _ = calibrator(network(), config(schedule=schedule))
        return calibration, cache, calibration.run()


@pytest.mark.parametrize("schedule", ["unit", "stage"])
def test_a_stage_learns_behind_the_quantized_prefix_and_against_the_float_network(schedule: str) -> None:
    calibration, cache, results = finished(Chain, schedule)
    networks, stages = calibration.networks, calibration.stages
    assert any(result.kept for result in results)
    for stage in stages:
        for batch in range(3):
            read = read_by(networks, networks.student, stage.name, batch)
            assert equal(cache.of(Role.STUDENT_READS, stage.name, batch), read)
            returned = returned_by(networks, networks.student, stage.name, batch)
            assert equal(cache.of(Role.STUDENT, stage.name, batch), returned)
            read = read_by(networks, networks.teacher, stage.name, batch)
            assert equal(cache.of(Role.TEACHER_READS, stage.name, batch), read)
            for name in {stage.name, *(unit.name for unit in stage.units)}:
                wanted = returned_by(networks, networks.teacher, name, batch)
                assert equal(cache.of(Role.TEACHER, name, batch), wanted)


def test_units_of_a_stage_learn_behind_the_finished_ones() -> None:
    calibration, cache, _ = finished(Chain, "unit")
    networks = calibration.networks
    units = [unit.name for stage in calibration.stages for unit in stage.units if unit.name != stage.name]
    assert units
    for name in units:
        assert equal(cache.of(Role.STUDENT, name, 0), returned_by(networks, networks.student, name, 0))


@pytest.mark.parametrize("network", [Chain, Pyramid])
@pytest.mark.parametrize("schedule", ["unit", "stage"])
def test_stages_come_in_order_and_results_one_per_unit(network: type[nn.Module], schedule: str) -> None:
    calibration, cache, results = finished(network, schedule)
    order = list(dict.fromkeys(key.module for key, _ in cache.last if key.role is Role.TEACHER_READS))
    assert order == [stage.name for stage in calibration.stages]
    units = [(unit.name, stage.name) for stage in calibration.stages for unit in stage.units]
    assert [(result.name, result.stage) for result in results] == units
    assert all(result.loss_after <= result.loss_before or result.kept for result in results)


@pytest.mark.parametrize("schedule", ["unit", "stage"])
def test_what_only_a_stage_needed_is_forgotten(schedule: str) -> None:
    calibration, cache, _ = finished(Chain, schedule)
    stages = {stage.name for stage in calibration.stages}
    kept = {key for key, batch in cache.last if (key, batch) in cache}
    assert kept == {Activation(role, name) for role in (Role.TEACHER, Role.STUDENT) for name in stages}


@pytest.mark.parametrize("schedule", ["unit", "stage", "network"])
@pytest.mark.parametrize("network_steps", [pytest.param(0, marks=slow), 3])
def test_the_steps_taken_are_those_foretold_and_all_quantizers_round_again(schedule: str, network_steps: int) -> None:
    settings = config(schedule=schedule, network_steps=network_steps, steps=2)
    calibration, _, steps = calibrator(Chain(), settings)
    calibration.run()
    assert len(steps) == total_steps(calibration.stages, settings)
    layers = [module for module in calibration.networks.student.modules() if isinstance(module, QuantizedLayer)]
    assert layers
    assert all(layer.input_fake_quant.quantizing and layer.weight_fake_quant.quantizing for layer in layers)


def failing_at(name: str, error: BaseException, networks: Networks) -> Networks:
    """The same networks, whose quantized stage ``name`` cannot be run alone."""

    def run_alone(module: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        if module == name:
            raise error
        return networks.run_alone(module, inputs)

    values = {**vars(networks), "run_alone": run_alone}
    return Networks(**values)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        pytest.param(torch.OutOfMemoryError("out of memory"), marks=slow),
        pytest.param(RuntimeError("DefaultCPUAllocator: can't allocate memory"), marks=slow),
        CalibrationError("something of the user's"),
    ],
    ids=["host", "device", "allocator", "own"],
)
def test_full_memory_and_errors_of_our_own_end_the_calibration(error: BaseException) -> None:
    calibration, _, _ = calibrator(Chain(), config())
    calibration.networks = failing_at("stages.1", error, calibration.networks)
    with pytest.raises(type(error)) as raised:
        calibration.run()
    assert raised.value is error
    assert calibration.left_float == {}


@pytest.mark.parametrize("schedule", ["unit", "stage"])
@pytest.mark.parametrize("network_steps", [pytest.param(0, marks=slow), 2])
def test_a_stage_that_raises_stays_float_with_the_reason_and_the_rest_goes_on(
    schedule: str, network_steps: int
) -> None:
    calibration, cache, _ = calibrator(Chain(), config(schedule=schedule, network_steps=network_steps))
    calibration.networks = failing_at("stages.1", KeyError("context"), calibration.networks)
    results = {result.name: result for result in calibration.run()}
    reason = "could not be run alone (KeyError: 'context')"
    assert calibration.left_float == {"stages.1.0.conv": reason, "stages.1.1.conv": reason}
    for name, result in results.items():
        failed = name.startswith("stages.1")
        assert (result.note == reason) == failed
        assert math.isnan(result.loss_before) == math.isnan(result.loss_after) == failed
    assert not any(result.kept for name, result in results.items() if name.startswith("stages.1"))
    assert any(result.kept for name, result in results.items() if name.startswith("stages.2"))
    assert not any(key.module == "stages.1" for key, batch in cache.last if (key, batch) in cache)
    modules = dict(calibration.networks.student.named_modules())
    for name in ("stages.1.0.conv", "stages.1.1.conv", "stages.2.0.conv"):
        layer = cast(QuantizedLayer, modules[name])
        assert layer.weight_fake_quant.quantizing == layer.input_fake_quant.quantizing == name.startswith("stages.2")


@slow
def test_the_network_as_a_whole_follows_what_its_stages_found() -> None:
    results = []
    for network_steps in (0, 30):
        torch.manual_seed(0)
        calibration, _, _ = calibrator(Chain(), config(network_steps=network_steps, solve=False))
        results.append(calibration.run())
    for alone, both in zip(*results, strict=True):
        assert (both.name, both.stage, both.loss_before) == (alone.name, alone.stage, alone.loss_before)
        assert both.note.startswith(alone.note)
        assert both.kept or not alone.kept
    assert [both.loss_after for both in results[1]] != [alone.loss_after for alone in results[0]]


def test_steps_are_counted_by_schedule() -> None:
    stages = [Stage("a", ()), *calibrator(Chain(), config())[0].stages]
    units = sum(len(stage.units) for stage in stages)
    assert total_steps(stages, config(schedule="stage", steps=7, network_steps=5)) == 7 * len(stages) + 5
    assert total_steps(stages, config(schedule="unit", steps=7, network_steps=5)) == 7 * units + 5
    assert total_steps(stages, config(schedule="network", steps=7, network_steps=5)) == 7
