"""One optimisation: what it trains on, what it is judged on, and that a worse result leaves no trace."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from repapq_plugin.config import LearningRates, RepAPQConfig
from repapq_plugin.core.progress import Advance
from repapq_plugin.errors import CheckpointError
from repapq_plugin.method import optimise
from repapq_plugin.method.learners import Learnable
from repapq_plugin.method.optimise import Outcome, Outputs, evaluate, reconstruct, split_batches
from tests.support.comparing import equal_numbers


class ToyLearner:
    """A linear layer whose weight and bias learn, and what it was told."""

    def __init__(self, offsets: bool = False) -> None:
        self.module = nn.Linear(3, 2)
        self.dropping: list[bool] = []
        self._offsets = offsets
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)

    def learnables(self, magnitude: float, rates: LearningRates) -> list[Learnable]:
        return [Learnable(self.module.weight, rates.weight), Learnable(self.module.bias, rates.scale)]

    def offsets(self) -> list[Tensor]:
        return [self.module.bias] if self._offsets else []

    def state(self) -> dict[str, Tensor]:
        return dict(self.module.state_dict())

    def set_quantizing(self, enabled: bool) -> None:
        raise AssertionError("an optimisation leaves quantizing alone")

    def set_dropping(self, enabled: bool) -> None:
        self.dropping.append(enabled)

    @property
    def drops(self) -> bool:
        return bool(self.dropping) and self.dropping[-1]


class ToySubject:
    """Learns to follow another linear layer; writes down which batches it ran, and how."""

    name = "toy"

    def __init__(self, batches: int, offsets: bool = False) -> None:
        self.learner = ToyLearner(offsets)
        self.learners = {"layer": self.learner}
        self.inputs = [torch.randn(8, 3) for _ in range(batches)]
        self.wanted = nn.Linear(3, 2)
        self.trained: list[int] = []
        self.judged: list[int] = []

    def student(self, batch: int) -> Outputs:
        (self.trained if torch.is_grad_enabled() else self.judged).append(batch)
        assert self.learner.drops == torch.is_grad_enabled() or not self.trained
        return Outputs({"layer": [self.learner.module(self.inputs[batch])]}, [])

    def teacher(self, batch: int) -> Outputs:
        with torch.no_grad():
            return Outputs({"layer": [self.wanted(self.inputs[batch])]}, [])

    def state(self) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in self.learner.state().items()}


def square_loss(outputs: Outputs, targets: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
    value = (outputs.units["layer"][0] - targets.units["layer"][0]).square().mean()
    return value, {"layer": value.detach()}


def settings(**keys: object) -> RepAPQConfig:
    rates = LearningRates(weight=0.05, scale=0.02)
    return RepAPQConfig(**{"steps": 12, "guard_fraction": 0.25, "learning_rates": rates, **keys})


def ignore(part: str = "", loss: float | None = None) -> None:
    return None


@given(count=st.integers(1, 200), fraction=st.floats(0, 0.5))
def test_training_and_held_out_batches_are_disjoint_and_together_all(count: int, fraction: float) -> None:
    training, held_out = split_batches(count, fraction)
    assert training and held_out
    if fraction and count > 1:
        assert training + held_out == list(range(count))
        assert len(held_out) == max(1, round(count * fraction))
    else:
        assert training == held_out == list(range(count))


def test_a_better_result_stays() -> None:
    subject = ToySubject(8)
    start, outcome = subject.state(), reconstruct(subject, square_loss, 8, settings(), ignore)
    assert outcome.kept and outcome.note == ""
    assert not equal_numbers(subject.state(), start)
    after, parts = evaluate(subject, square_loss, [6, 7])
    assert outcome.unit_losses_after == parts == {"layer": pytest.approx(after)}
    assert after < outcome.unit_losses_before["layer"]


def test_a_worse_result_is_undone_bit_for_bit() -> None:
    subject = ToySubject(8)
    with torch.no_grad():  # almost there: full steps only lead away
        for mine, wanted in zip(subject.learner.module.parameters(), subject.wanted.parameters(), strict=True):
            mine.copy_(wanted + 1e-6)
    start = subject.state()
    outcome = reconstruct(subject, square_loss, 8, settings(steps=3), ignore)
    assert not outcome.kept
    assert "held-out loss went from" in outcome.note and "the starting point stays" in outcome.note
    assert equal_numbers(subject.state(), start)
    assert outcome.unit_losses_after == outcome.unit_losses_before


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 4])
def test_a_loss_that_is_not_finite_ends_the_optimisation_and_is_undone(value: float, at: int) -> None:
    subject, steps = ToySubject(8), list[int]()

    def breaks(outputs: Outputs, targets: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        total, parts = square_loss(outputs, targets)
        return (total * value if torch.is_grad_enabled() and len(steps) == at else total), parts

    start = subject.state()
    outcome = reconstruct(subject, breaks, 8, settings(), lambda *_: steps.append(1))
    assert len(steps) == at
    if at:  # the steps before were good ones, and are judged like any others
        assert f"the loss became {value} at step {at}" in outcome.note
    else:
        assert not outcome.kept and equal_numbers(subject.state(), start)


def test_a_result_that_is_not_finite_where_it_is_judged_is_undone() -> None:
    subject = ToySubject(8)

    def breaks(outputs: Outputs, targets: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        total, parts = square_loss(outputs, targets)
        return (total if torch.is_grad_enabled() or not subject.trained else total * math.nan), parts

    start = subject.state()
    outcome = reconstruct(subject, breaks, 8, settings(), ignore)
    assert not outcome.kept and "to nan" in outcome.note
    assert equal_numbers(subject.state(), start)


def test_held_out_batches_are_never_learned_from_and_the_others_are_drawn_in_turn() -> None:
    subject = ToySubject(8)
    reconstruct(subject, square_loss, 8, settings(steps=18), ignore)
    assert [sorted(subject.trained[begin : begin + 6]) for begin in (0, 6, 12)] == [list(range(6))] * 3
    assert subject.judged == [6, 7, 0, 6, 7]  # before, the size of the outputs, after
    assert len({tuple(subject.trained[begin : begin + 6]) for begin in (0, 6, 12)}) > 1


def test_the_seed_says_the_order() -> None:
    orders = []
    for seed in (3, 3, 4):
        subject = ToySubject(8)
        torch.manual_seed(seed * 100 + len(orders))  # of no importance
        reconstruct(subject, square_loss, 8, settings(seed=seed), ignore)
        orders.append(subject.trained)
    assert orders[0] == orders[1] != orders[2]


def test_rates_start_where_a_learner_says_and_end_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.optim.Adam] = []
    rates: list[list[float]] = []

    class Watched(torch.optim.Adam):
        def __init__(self, *args: object, **keys: object) -> None:
            super().__init__(*args, **keys)  # type: ignore[arg-type]
            made.append(self)

    def note(*_: object) -> None:
        rates.append([group["lr"] for group in made[0].param_groups])

    monkeypatch.setattr(optimise.torch.optim, "Adam", Watched)
    reconstruct(ToySubject(4), square_loss, 4, settings(), note)
    assert [group["initial_lr"] for group in made[0].param_groups] == [0.05, 0.02]
    assert len(rates) == 12
    assert all(torch.tensor(then).lt(torch.tensor(now)).all() for now, then in zip(rates, rates[1:], strict=False))
    assert rates[5] == pytest.approx([0.025, 0.01])
    assert rates[-1] == pytest.approx([0, 0], abs=1e-12)


def test_activations_are_dropped_only_while_training() -> None:
    subject = ToySubject(4)  # which asserts at each pass that it drops while gradients are taken, and else not
    reconstruct(subject, square_loss, 4, settings(), ignore)
    assert subject.learner.dropping == [True, False]


def stop(part: str = "", loss: float | None = None) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("advance", [ignore, stop], ids=["done", "interrupted"])
def test_parameters_end_without_gradients_also_after_an_error(advance: Advance) -> None:
    subject = ToySubject(4)
    if advance is ignore:
        reconstruct(subject, square_loss, 4, settings(), advance)
    else:
        with pytest.raises(KeyboardInterrupt):
            reconstruct(subject, square_loss, 4, settings(), advance)
    assert not subject.learner.drops
    assert all(not p.requires_grad and p.grad is None for p in subject.learner.module.parameters())


def test_biases_leave_their_ties_before_they_are_judged() -> None:
    finals = []
    for offsets in (False, True):
        torch.manual_seed(0)
        subject = ToySubject(4, offsets)
        outcome = reconstruct(subject, square_loss, 4, settings(), ignore)
        assert outcome.kept
        assert outcome.unit_losses_after["layer"] == pytest.approx(evaluate(subject, square_loss, [3])[0])
        finals.append(subject.state())
    assert torch.equal(finals[0]["weight"], finals[1]["weight"])
    assert torch.equal(finals[0]["bias"] * (1 + 1e-4), finals[1]["bias"])


def test_a_mean_over_batches_is_what_judges() -> None:
    subject = ToySubject(3)
    total, parts = evaluate(subject, square_loss, [0, 1, 2])
    single = [evaluate(subject, square_loss, [batch])[0] for batch in range(3)]
    assert total == pytest.approx(sum(single) / 3)
    assert parts == {"layer": pytest.approx(total)}


@pytest.mark.parametrize("record", [{}, {"kept": True}, {"other": 1}])
def test_a_record_of_something_else_is_no_outcome(record: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="says nothing of what was learned"):
        Outcome.of(record)
