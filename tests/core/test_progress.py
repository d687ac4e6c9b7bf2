"""Progress as lines of a log: one every ten seconds, and one at the end of each phase."""

from __future__ import annotations

from repapq_plugin.core.progress import Progress, ProgressLines


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_of(steps: list[tuple[float, Progress]]) -> list[str]:
    found: list[str] = []
    clock = Clock()
    lines = ProgressLines(found.append, clock=clock)
    for seconds, progress in steps:
        clock.now += seconds
        lines(progress)
    return found


def test_a_line_stands_for_ten_seconds_and_one_for_the_end() -> None:
    steps = [(1.0, Progress("calibration", done, 25, "stages.1", 0.01234)) for done in range(26)]
    assert lines_of(steps) == [
        "calibration: 10 of 25, stages.1, loss 0.0123, 0:00:15 left",
        "calibration: 20 of 25, stages.1, loss 0.0123, 0:00:05 left",
        "calibration: 25 of 25, stages.1, loss 0.0123, took 0:00:25",
    ]


def test_each_phase_has_a_time_of_its_own() -> None:
    steps = [(60.0, Progress("ranges", done, 1)) for done in range(2)]
    steps += [(2.0, Progress("calibration", done, 1)) for done in range(2)]
    assert lines_of(steps) == ["ranges: 1 of 1, took 0:01:00", "calibration: 1 of 1, took 0:00:02"]


def test_a_start_that_takes_long_is_told_without_a_guess() -> None:
    assert lines_of([(0.0, Progress("ranges", 0, 4)), (11.0, Progress("ranges", 0, 4))]) == ["ranges: 0 of 4"]


def test_what_is_told_only_at_its_end_claims_no_time() -> None:
    assert lines_of([(5.0, Progress("calibration images", 8, 8))]) == ["calibration images: 8 of 8"]
