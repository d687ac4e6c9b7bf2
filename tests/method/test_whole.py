"""Learning stays as far as the whole network is no worse for it than with ranges alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from repapq_plugin import CalibrationResult, RepAPQConfig
from repapq_plugin.backend import OwnBackend
from repapq_plugin.job import Job, State
from repapq_plugin.method.learners import snapshot
from repapq_plugin.method.partition import Stage, Unit
from repapq_plugin.method.unit_result import UnitResult
from repapq_plugin.method.whole import keep_what_helps, outside
from tests.support.networks import Chain, Pyramid, batches, settle


class Number:
    """A learner of one number, 0 before it learned and 1 afterwards."""

    def __init__(self) -> None:
        self.value = torch.zeros(())

    def state(self) -> dict[str, Tensor]:
        return {"value": self.value}


def learned(
    kept: Sequence[bool], error: Callable[[list[float]], float], before: float, loose: bool = False
) -> tuple[list[UnitResult], str, list[float]]:
    """Let stages of one unit each learn; return what is left, the note, and the numbers."""
    names = [f"s{index}" for index in range(len(kept))]
    learners = {f"{name}.layer": Number() for name in names} | ({"between": Number()} if loose else {})
    start = snapshot(learners)  # type: ignore[arg-type]
    for learner in learners.values():
        learner.value.fill_(1)
    stages = [Stage(name, (Unit(f"{name}.unit", (f"{name}.layer",)),)) for name in names]
    results = [
        UnitResult(f"{name}.unit", name, 2.0, 1.0 if stays else 2.0, stays, 0.1)
        for name, stays in zip(names, kept, strict=True)
    ]

    def numbers() -> list[float]:
        return [float(learner.value) for learner in learners.values()]

    found, note = keep_what_helps(results, stages, learners, start, before, lambda: error(numbers()))  # type: ignore[arg-type]
    return found, note, numbers()


def test_what_is_no_worse_stays() -> None:
    results, note, numbers = learned([True, True], lambda _: 1.0, before=1.0)
    assert note == "" and all(result.kept for result in results) and numbers == [1, 1]


def test_stages_are_undone_from_the_last_one_on_until_the_network_is_no_worse() -> None:
    results, note, numbers = learned([True] * 4, lambda n: 1 + n[2] + n[3] - n[0], before=0.5)
    assert numbers == [1, 1, 0, 0]
    assert [result.kept for result in results] == [True, True, False, False]
    assert [result.loss_after for result in results] == [1, 1, 2, 2]
    assert "undone in 2 of 4 units" in note and "from 0.5 to 2; 0 now" in note
    assert all("from 0.5 to 2" in result.note for result in results[2:]) and not results[0].note


def test_nothing_stays_where_nothing_helps() -> None:
    results, note, numbers = learned([True] * 3, lambda n: sum(n), before=0.0, loose=True)
    assert numbers == [0, 0, 0, 0] and not any(result.kept for result in results)
    assert "undone in 3 of 3 units" in note and note.endswith("ranges only.")


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_an_error_that_is_no_number_is_worse(error: float) -> None:
    _, note, numbers = learned([True, True], lambda n: error if sum(n) else 1.0, before=1.0)
    assert numbers == [0, 0] and "undone in 2 of 2" in note


def test_stages_that_kept_nothing_are_not_asked_again() -> None:
    asked: list[list[float]] = []

    def error(numbers: list[float]) -> float:
        asked.append(numbers)
        return 1.0

    results, note, _ = learned([False, False], error, before=0.5)
    assert (asked, note) == ([], "") and not any(result.kept for result in results)
    learned([False, True, False], error, before=0.5)
    assert len(asked) == 2


def test_layers_that_stay_float_are_left_out() -> None:
    assert list(outside({"a": Number(), "b": Number()}, ["b"])) == ["a"]  # type: ignore[dict-item]


@given(st.lists(st.booleans(), min_size=1, max_size=5), st.lists(st.floats(-1, 1), min_size=5, max_size=5))
def test_the_network_is_never_worse_than_before(kept: list[bool], effects: list[float]) -> None:
    def error(numbers: Sequence[float]) -> float:
        return sum(number * effect for number, effect in zip(numbers, effects, strict=False))

    # Where a stage was not kept its own guard took it back already.
    effects = [effect if stays else 0.0 for effect, stays in zip(effects, kept, strict=False)]
    results, note, numbers = learned(kept, error, before=0.0)
    assert error(numbers) <= 0
    undone = sum(before and not result.kept for before, result in zip(kept, results, strict=True))
    assert bool(undone) == bool(note)
    first_gone = next((i for i, result in enumerate(results) if kept[i] and not result.kept), len(kept))
    assert not any(result.kept for result in results[first_gone:])  # never a stage behind one that is undone


class Measured(Job[CalibrationResult]):
    """Tells the whole network's error as it was before and after learning."""

    errors: tuple[float, float]

    def learn(self, state: State) -> None:
        before = self._whole_error(state)
        super().learn(state)
        self.errors = before, self._whole_error(state)


@pytest.mark.parametrize("network", [Chain, Pyramid])
@pytest.mark.parametrize("schedule", ["stage", "unit", "network"])
@pytest.mark.parametrize("rate", [0.01, 0.5])
def test_a_job_never_gives_more_error_than_ranges_alone(network: type[nn.Module], schedule: str, rate: float) -> None:
    rates = {"weight": rate, "scale": rate, "affine": rate}
    for seed in range(3):
        torch.manual_seed(seed)
        config = RepAPQConfig.from_preset("w4a4", steps=3, schedule=schedule, seed=seed, learning_rates=rates)
        job = Measured(OwnBackend(), config)
        result = job.run(settle(network()), batches(6))
        before, after = job.errors
        assert after <= before
        assert any(unit.kept for unit in result.units) or after == before


class Misjudged(Job[CalibrationResult]):
    """Finds the whole network worse as long as its last stage is learned."""

    def _whole_error(self, state: State) -> float:
        last = state.stages[-1].units[-1].layers[-1]
        weight = dict(self.backend.student.named_modules())[last].weight
        return float((weight - state.teacher.get_submodule(last).weight).abs().max())  # 0 with ranges alone


def test_the_record_of_a_job_tells_what_was_undone() -> None:
    result = Misjudged(OwnBackend(), RepAPQConfig.from_preset("w4a4", steps=20)).run(settle(Chain()), batches(8))
    told = [note for note in result.notes if note.startswith("Learning was undone in")]
    assert len(told) == 1 and "held-out error went from 0 to" in told[0]
    assert any(unit.kept for unit in result.units)
    undone = [unit for unit in result.units if unit.note.startswith("undone:")]
    assert undone == [unit for unit in result.units if unit.stage == result.units[-1].stage]
    assert all(unit.loss_after == unit.loss_before and not unit.kept for unit in undone)
