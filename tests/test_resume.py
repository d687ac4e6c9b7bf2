"""A calibration that was interrupted goes on and ends as if it had not been; another one is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repapq_plugin import CalibrationResult, Progress, RepAPQConfig, quantize_model
from repapq_plugin.errors import CheckpointError, ConfigError
from repapq_plugin.method.solve_units import StageSolver
from repapq_plugin.method.whole import keep_what_helps
from tests.support.comparing import equal_numbers, numbers
from tests.support.disk import largest_file
from tests.support.networks import Chain, Pyramid, batches, settle

SCHEDULES = ("unit", "stage", "network")


def config(schedule: str = "stage", **keys: object) -> RepAPQConfig:
    # Values dropped at random: what is drawn after an interruption must be what would have been drawn.
    more = {} if schedule == "network" else {"network_steps": 3}
    return RepAPQConfig.from_preset(
        "w4a4", **{"steps": 4, "schedule": schedule, "drop_probability": 0.3, **more, **keys}
    )


@pytest.fixture
def data() -> list[Tensor]:
    torch.manual_seed(2)
    return batches(4)


def chain() -> nn.Module:
    torch.manual_seed(1)
    return settle(Chain())


def same(one: CalibrationResult, other: CalibrationResult) -> bool:
    units = [repr([replace(unit, seconds=0) for unit in result.units]) for result in (one, other)]  # NaN is NaN here
    return (
        equal_numbers(numbers(one.model), numbers(other.model))
        and units[0] == units[1]
        and one.plan == other.plan
        and one.notes == other.notes
    )


class Stop(KeyboardInterrupt):
    """What interrupts."""


def stopping_after(steps: int) -> Callable[[Progress], None]:
    """Return a report that stops a calibration after so many optimisation steps."""

    def report(progress: Progress) -> None:
        if progress.phase == "calibration" and progress.done == steps:
            raise Stop

    return report


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("make", [Chain, Pyramid])
def test_after_any_number_of_interruptions_the_result_is_the_same_to_the_last_bit(
    schedule: str, make: Callable[[], nn.Module], data: list[Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model, settings = settle(make()), config(schedule)
    wanted = quantize_model(model, data, settings)
    for _ in range(2):  # each time a part is finished, and the next one is broken off; the network has only one
        stop = stopping_after(2 if schedule == "network" else 4 + 2)
        with pytest.raises(Stop):
            quantize_model(model, data, settings, progress=stop, checkpoint_dir=tmp_path, resume=True)
    assert len(list(tmp_path.glob("part-*"))) == (1 if schedule == "network" else 3)
    assert same(quantize_model(model, data, settings, checkpoint_dir=tmp_path, resume=True), wanted)
    again = quantize_model(
        model, data, settings, progress=stopping_after(1), checkpoint_dir=tmp_path, resume=True
    )  # nothing is left to learn
    assert same(again, wanted)


def test_what_was_solved_is_not_solved_again(
    data: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(solve=True)
    wanted = quantize_model(chain(), data, settings)
    with pytest.raises(Stop):
        quantize_model(chain(), data, settings, progress=stopping_after(4 + 2), checkpoint_dir=tmp_path, resume=True)
    solved: list[object] = []
    solve = StageSolver.solve

    def noted(self: StageSolver, *args: object) -> object:
        solved.append(self)
        return solve(self, *args)

    monkeypatch.setattr(StageSolver, "solve", noted)
    assert same(quantize_model(chain(), data, settings, checkpoint_dir=tmp_path, resume=True), wanted)
    stages = {unit.stage for unit in wanted.units}
    assert len(solved) == len(stages) - 2


def taken(seen: list[Progress]) -> dict[str, int]:
    """How many steps were really taken for each part; those brought back have no loss."""
    return Counter(progress.part for progress in seen if progress.loss is not None)


@pytest.fixture
def after_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the state within a part after each step, not once in a minute."""
    monkeypatch.setattr("repapq_plugin.core.part_files.HALFWAY_SECONDS", 0.0)


@pytest.mark.usefixtures("after_each_step")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_part_goes_on_in_its_middle(schedule: str, data: list[Tensor], tmp_path: Path) -> None:
    settings, first, seen = config(schedule, steps=7), list[Progress](), list[Progress]()
    wanted = quantize_model(chain(), data, settings, progress=first.append)
    for done in (3, 5):
        with pytest.raises(Stop):
            quantize_model(chain(), data, settings, progress=stopping_after(done), checkpoint_dir=tmp_path, resume=True)
    found = quantize_model(chain(), data, settings, progress=seen.append, checkpoint_dir=tmp_path, resume=True)
    assert same(found, wanted)
    whole, rest = taken(first), taken(seen)
    part = next(iter(whole))
    if schedule != "unit":  # units of a stage report under its name
        assert rest.pop(part) == whole.pop(part) - 5 and rest == whole
    assert sum(taken(first).values()) - sum(taken(seen).values()) == 5
    assert (seen[-1].done, seen[-1].total) == (first[-1].done, first[-1].total)
    assert not (tmp_path / "halfway.safetensors").exists()


@pytest.mark.usefixtures("after_each_step")
def test_the_middle_of_a_part_is_worth_nothing_once_one_before_it_is_done_again(
    data: list[Tensor], tmp_path: Path
) -> None:
    first, seen = list[Progress](), list[Progress]()
    wanted = quantize_model(chain(), data, config(), progress=first.append)
    with pytest.raises(Stop):
        quantize_model(chain(), data, config(), progress=stopping_after(6), checkpoint_dir=tmp_path)
    (tmp_path / "part-00001.safetensors").unlink()
    found = quantize_model(chain(), data, config(), progress=seen.append, checkpoint_dir=tmp_path, resume=True)
    assert same(found, wanted) and taken(seen) == taken(first)


@pytest.mark.usefixtures("after_each_step")
def test_a_damaged_middle_is_named_and_may_be_deleted(data: list[Tensor], tmp_path: Path) -> None:
    with pytest.raises(Stop):
        quantize_model(chain(), data, config(), progress=stopping_after(6), checkpoint_dir=tmp_path)
    path = tmp_path / "halfway.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"halfway\.safetensors is damaged .*; delete it"):
        quantize_model(chain(), data, config(), checkpoint_dir=tmp_path, resume=True)
    path.unlink()
    found = quantize_model(chain(), data, config(), checkpoint_dir=tmp_path, resume=True)
    assert same(found, quantize_model(chain(), data, config()))


@pytest.mark.usefixtures("after_each_step")
def test_a_middle_that_cannot_be_kept_stops_nothing(
    data: list[Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ExitStack() as stack:

        def report(progress: Progress) -> None:
            if progress.phase == "calibration" and progress.done == 0:
                stack.enter_context(largest_file(1000))

        found = quantize_model(chain(), data, config("network"), progress=report, checkpoint_dir=tmp_path)
    assert equal_numbers(numbers(found.model), numbers(quantize_model(chain(), data, config("network")).model))
    assert caplog.text.count("The state within 'network' cannot be kept") == 1
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["part-00000.safetensors"]


def test_only_what_is_left_is_counted(data: list[Tensor], tmp_path: Path) -> None:
    seen: list[Progress] = []
    settings = config()
    quantize_model(chain(), data, settings, progress=seen.append, checkpoint_dir=tmp_path)
    whole = seen[-1].total
    for part in sorted(tmp_path.glob("part-*"))[3:]:  # ranges and two stages stay
        part.unlink()
    seen.clear()
    quantize_model(chain(), data, settings, progress=seen.append, checkpoint_dir=tmp_path, resume=True)
    assert (seen[-1].done, seen[-1].total) == (whole - 2 * 4, whole - 2 * 4)


class Inside(nn.Module):
    """Runs inside its network alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inside = nn.Conv2d(8, 8, 3, padding=1), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.inside:
            raise KeyError("context")
        return self.conv(x).relu()


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Conv2d(3, 8, 3), Inside(), nn.Conv2d(8, 4, 3)
        self.end = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        self.middle.inside = True
        try:
            return self.end(self.head(self.middle(x)))
        finally:
            self.middle.inside = False


def test_a_stage_that_cannot_run_alone_stays_float_again(data: list[Tensor], tmp_path: Path) -> None:
    model, settings = Network().eval(), config(stages=("stem", "middle", "head", "end"))
    wanted = quantize_model(model, data, settings)
    assert set(wanted.float_layers) == {"middle.conv"}
    with pytest.raises(Stop):
        quantize_model(model, data, settings, progress=stopping_after(10), checkpoint_dir=tmp_path)
    assert len(list(tmp_path.glob("part-*"))) == 3
    seen: list[Progress] = []
    found = quantize_model(model, data, settings, progress=seen.append, checkpoint_dir=tmp_path, resume=True)
    assert same(found, wanted)
    assert sum(progress.part == "head" for progress in seen) == 0, "what lies behind it is kept too"


def test_learning_that_is_undone_is_undone_again(
    data: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def against_nothing(*args: Any) -> Any:
        *known, _, error = args
        return keep_what_helps(*known, -1.0, error)

    monkeypatch.setattr("repapq_plugin.job.keep_what_helps", against_nothing)
    settings = config()
    wanted = quantize_model(chain(), data, settings)
    assert "Learning was undone" in wanted.notes[-1] and not any(unit.kept for unit in wanted.units)
    with pytest.raises(Stop):
        quantize_model(chain(), data, settings, progress=stopping_after(6), checkpoint_dir=tmp_path)
    assert same(quantize_model(chain(), data, settings, checkpoint_dir=tmp_path, resume=True), wanted)


def test_ranges_alone_are_kept_too(data: list[Tensor], tmp_path: Path) -> None:
    settings, seen = config().replace(steps=0), list[Progress]()
    wanted = quantize_model(chain(), data, settings, checkpoint_dir=tmp_path)
    assert len(list(tmp_path.glob("part-*"))) == 1
    found = quantize_model(chain(), data, settings, progress=seen.append, checkpoint_dir=tmp_path, resume=True)
    assert same(found, wanted)
    assert [progress.done for progress in seen] == [0]


@dataclass
class Case:
    """What a calibration is made of."""

    model: nn.Module
    data: list[Tensor]
    config: RepAPQConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda case: replace(case, config=config(loss="mae")), 'config.loss was "mse" and is "mae"'),
        (lambda case: replace(case, model=Chain().eval()), "the model differs in stem.large"),
        (lambda case: replace(case, model=Pyramid().eval()), "the model differs in its modules"),
        (lambda case: replace(case, data=case.data[:2]), "there were 4 calibration batches and are 2"),
        (lambda case: replace(case, data=case.data[::-1]), "the calibration batches come in another order"),
        (lambda case: (torch.set_num_threads(2), case)[1], "threads was 1 and is 2"),
    ],
    ids=["config", "weights", "network", "fewer", "order", "threads"],
)
def test_what_is_not_the_same_calibration_is_refused(
    change: Callable[[Case], Case], message: str, data: list[Tensor], tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        quantize_model(chain(), data, config(), progress=stopping_after(6), checkpoint_dir=tmp_path)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    case = change(Case(chain(), data, config()))
    with pytest.raises(CheckpointError, match=f"{message}.*start anew: delete {tmp_path}"):
        quantize_model(case.model, case.data, case.config, checkpoint_dir=tmp_path, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_a_version_that_has_changed_is_refused(
    data: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Stop):
        quantize_model(chain(), data, config(), progress=stopping_after(6), checkpoint_dir=tmp_path)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "9.9")
    with pytest.raises(CheckpointError, match=r"version repapq-plugin was .* and is 9\.9; version torch was"):
        quantize_model(chain(), data, config(), checkpoint_dir=tmp_path, resume=True)


def test_a_disk_that_fills_up_is_noted_with_the_result(data: list[Tensor], tmp_path: Path) -> None:
    wanted = quantize_model(chain(), data, config())

    with ExitStack() as stack:

        def report(progress: Progress) -> None:
            if progress.phase == "calibration" and progress.done == 1:
                stack.enter_context(largest_file(1000))

        found = quantize_model(chain(), data, config(), progress=report, checkpoint_dir=tmp_path)
    assert equal_numbers(numbers(found.model), numbers(wanted.model))
    assert "From 'stage stem' on nothing was kept" in found.notes[-1]


def test_resuming_needs_a_folder(data: list[Tensor]) -> None:
    with pytest.raises(ConfigError, match="resume=True is not allowed without checkpoint_dir"):
        quantize_model(chain(), data, resume=True)
