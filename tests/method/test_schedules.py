"""What is live and what answers from the cache while a unit, a stage or the network learns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from repapq_plugin.method.cache import ActivationCache
from repapq_plugin.method.optimise import Outputs
from repapq_plugin.method.partition import Stage, Unit
from repapq_plugin.method.schedules import (
    Activation,
    Cache,
    NetworkSubject,
    Role,
    StageRun,
    StageSubject,
    UnitSubject,
)
from tests.support.comparing import equal


class Counted(nn.Linear):
    """Knows how often it ran."""

    def __init__(self, role: str = "") -> None:
        super().__init__(4, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Body(nn.Module):
    """Four units; the second is called twice, and glue of Python stands between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (Counted() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.d(self.c(self.b(self.b(x).relu()) + x).relu())


UNITS = tuple(Unit(f"body.{name}", (f"body.{name}",)) for name in "abcd")
CALLS = {"body.a": 1, "body.b": 2, "body.c": 1, "body.d": 1}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Body()

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        return {"levels": [self.body(x), self.body.a(x)]}

    def counts(self) -> dict[str, int]:
        """How often each unit ran since the last question."""
        found = {name: getattr(self.body, name).calls for name in "abcd"}
        for name in "abcd":
            getattr(self.body, name).calls = 0
        return found


class Setting:
    """A student, a teacher and a stage of both with what it reads and gives in the cache."""

    def __init__(self, cache: Cache) -> None:
        self.student, self.teacher, self.cache = Network(), Network(), cache
        self.x = torch.randn(2, 4)
        self.modules = dict(self.student.named_modules())
        cache.put(Activation(Role.STUDENT_READS, "body"), 0, [self.x])
        self.targets = {name: self._recorded(self.teacher, name) for name in CALLS}
        for name, outputs in self.targets.items():
            cache.put(Activation(Role.TEACHER, name), 0, outputs)
        self.end = [self.teacher.body(self.x)]
        cache.put(Activation(Role.TEACHER, "body"), 0, self.end)
        self.run = StageRun(Stage("body", UNITS), self.modules, self._run_alone, cache)
        self.student.counts(), self.teacher.counts()

    def _run_alone(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [self.student.body(x) for x in inputs]

    def _recorded(self, network: Network, name: str) -> list[Tensor]:
        found: list[Tensor] = []
        module = network.get_submodule(name)
        handle = module.register_forward_hook(lambda *args: found.append(args[-1]))
        network.body(self.x)
        handle.remove()
        return found

    def of_student(self, name: str) -> list[Tensor]:
        found = self._recorded(self.student, name)
        self.student.counts()
        return found

    def unit(self, position: int, stage_term: bool, finished: int | None = None) -> UnitSubject:
        """The unit at ``position`` with those before it finished."""
        names = [unit.name for unit in UNITS[: position if finished is None else finished]]
        for name in names:
            self.cache.put(Activation(Role.STUDENT, name), 0, self.of_student(name))
        self.student.counts()
        unit = UNITS[position]
        return UnitSubject(self.run, {}, unit, CALLS[unit.name], names, stage_term)


@pytest.fixture
def setting() -> Iterator[Setting]:
    with ActivationCache[Activation](2**20) as cache:
        yield Setting(cache)


def same_outputs(one: Outputs, units: dict[str, list[Tensor]], stage: Sequence[Tensor]) -> bool:
    return (
        one.units.keys() == units.keys()
        and all(equal(one.units[name], units[name]) for name in units)
        and equal(one.stage, stage)
    )


def test_a_stage_at_once_runs_live_and_is_compared_with_every_unit_and_its_end(setting: Setting) -> None:
    subject = StageSubject(setting.run, {})
    wanted = {name: setting.of_student(name) for name in CALLS}
    assert subject.name == "body"
    outputs = subject.student(0)
    assert setting.student.counts() == {"a": 1, "b": 2, "c": 1, "d": 1}
    assert same_outputs(outputs, wanted, [setting.student.body(setting.x)])
    assert same_outputs(subject.teacher(0), setting.targets, setting.end)
    assert setting.teacher.counts() == dict.fromkeys("abcd", 0)


def test_a_stage_that_is_its_only_unit_has_no_further_end(setting: Setting) -> None:
    run = StageRun(Stage("body", (Unit("body", ("body.a",)),)), setting.modules, setting.run.run_alone, setting.cache)
    subject = StageSubject(run, {})
    outputs, targets = subject.student(0), subject.teacher(0)
    assert outputs.stage == targets.stage == []
    assert list(outputs.units) == list(targets.units) == ["body"]


@pytest.mark.parametrize("position", range(4))
def test_a_unit_learns_behind_units_that_answer_and_before_units_that_run(setting: Setting, position: int) -> None:
    subject = setting.unit(position, stage_term=True)
    name = UNITS[position].name
    wanted = setting.of_student(name)
    outputs = subject.student(0)
    ran = setting.student.counts()
    live = {unit.name[-1] for unit in UNITS[position:]}
    assert {unit for unit, count in ran.items() if count} == live
    assert all(ran[unit] == CALLS[f"body.{unit}"] for unit in live)
    assert same_outputs(outputs, {name: wanted}, [setting.student.body(setting.x)])
    assert same_outputs(subject.teacher(0), {name: setting.targets[name]}, setting.end)


@pytest.mark.parametrize("position", range(4))
def test_without_the_stage_term_the_pass_ends_at_the_unit(setting: Setting, position: int) -> None:
    subject = setting.unit(position, stage_term=False)
    name = UNITS[position].name
    wanted = setting.of_student(name)
    outputs = subject.student(0)
    assert setting.student.counts() == {unit: CALLS[name] if f"body.{unit}" == name else 0 for unit in "abcd"}
    assert same_outputs(outputs, {name: wanted}, [])
    assert same_outputs(subject.teacher(0), {name: setting.targets[name]}, [])


@pytest.mark.parametrize("stage_term", [True, False])
def test_gradients_reach_the_unit_and_nothing_before_it(setting: Setting, stage_term: bool) -> None:
    outputs = setting.unit(2, stage_term).student(0)
    tensors = [*outputs.units["body.c"], *outputs.stage]
    sum(tensor.sum() for tensor in tensors).backward()
    body = setting.student.body
    assert body.c.weight.grad is not None
    assert body.a.weight.grad is None and body.b.weight.grad is None
    assert (body.d.weight.grad is not None) == stage_term


def test_what_a_finished_unit_gives_is_what_the_cache_says(setting: Setting) -> None:
    subject = setting.unit(2, stage_term=True)
    setting.cache.put(Activation(Role.STUDENT, "body.b"), 0, [torch.zeros(2, 4)] * 2)
    a = setting.cache.get(Activation(Role.STUDENT, "body.a"), 0)[0]
    assert torch.equal(subject.unit_outputs(0)[0], setting.student.body.c(a))


def test_everything_runs_again_afterwards(setting: Setting) -> None:
    before = setting.student.body(setting.x)
    for stage_term in (True, False):
        setting.unit(2, stage_term).student(0)
    assert torch.equal(setting.student.body(setting.x), before)
    assert all("forward" not in vars(module) for module in setting.student.modules())
    assert all(not module._forward_hooks for module in setting.student.modules())


def test_the_network_as_one_stage_runs_the_float_one_once_a_batch(setting: Setting) -> None:
    data = [torch.randn(2, 4) for _ in range(2)]
    units = UNITS[1:]
    student, teacher = setting.student, setting.teacher
    subject = NetworkSubject(units, {}, student, teacher, lambda model, batch: model(data[batch]), setting.cache)
    setting.cache.drop_everything()
    assert subject.name == "network"
    for repeat in range(3):
        for batch, x in enumerate(data):
            outputs, targets = subject.student(batch), subject.teacher(batch)
            assert teacher.counts()["b"] == (2 if repeat == 0 else 0)
            assert student.counts()["b"] == 2
            assert equal(outputs.stage, student(x)["levels"]) and outputs.stage[0].requires_grad
            assert equal(targets.stage, teacher(x)["levels"]) and not targets.stage[0].requires_grad
            assert list(outputs.units) == list(targets.units) == [unit.name for unit in units]
            assert [len(outputs.units[name]) for name in outputs.units] == [2, 1, 1]
            student.counts(), teacher.counts()
