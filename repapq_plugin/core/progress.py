"""How far a long work is, told as it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

LINE_SECONDS = 10.0
"""How often a log gets a line."""


ESTIMATE = "estimate"
"""Phase of a report that says, once, what the work will take; its ``part`` is a sentence."""


@dataclass(frozen=True)
class Progress:
    """How far a long work is.

    Args:
        phase: What goes on: ``"ranges"`` and ``"calibration"`` in a job, `ESTIMATE` before them; hosts also load and
            test.
        done: Batches observed or tested, images loaded, or optimisation steps taken.
        total: How many there will be.
        part: What is worked on, for example the module path of a stage.
        loss: Its loss now, if it has one.
    """

    phase: str
    done: int
    total: int
    part: str = ""
    loss: float | None = None

    @property
    def detail(self) -> str:
        """What is worked on and its loss, as people read it."""
        return ", ".join(filter(None, (self.part, "" if self.loss is None else f"loss {self.loss:.3g}")))


Report = Callable[[Progress], None]
"""Told as the work goes on."""


class Advance(Protocol):
    """Called after each step of a work."""

    def __call__(self, part: str = "", loss: float | None = None) -> None:
        """Count one step; ``part`` and ``loss`` are those of `Progress`."""


def counted(phase: str, total: int, report: Report | None) -> Advance:
    """Return what turns its calls into `Progress` reports; the first is made at once."""
    done = -1

    def advance(part: str = "", loss: float | None = None) -> None:
        nonlocal done
        done += 1
        if report is not None:
            report(Progress(phase, done, total, part, loss))

    advance()
    return advance


class ProgressLines:
    """A `Report` that writes a line every ten seconds, and one at the end of each phase: for logs.

    Args:
        write: Takes a line of text.
        seconds: Time between two lines, in seconds.
        clock: Returns the time in seconds, from any beginning.
    """

    def __init__(
        self,
        write: Callable[[str], None],
        seconds: float = LINE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write, self._seconds, self._clock = write, seconds, clock
        self._phase, self._started, self._last = "", 0.0, 0.0

    def __call__(self, progress: Progress) -> None:
        """Write a line if it is time for one."""
        if progress.phase == ESTIMATE:
            self._write(f"{progress.phase}: {progress.part}")
            return
        now = self._clock()
        begins = progress.phase != self._phase
        if begins:
            self._phase, self._started, self._last = progress.phase, now, now
        finished = progress.done == progress.total
        if not finished and now - self._last < self._seconds:
            return
        self._last, elapsed = now, now - self._started
        words = [f"{progress.phase}: {progress.done} of {progress.total}", progress.detail]
        if finished and not begins:  # of what is told only once it is over, nobody knows when it began
            words.append(f"took {_clock_time(elapsed)}")
        elif progress.done and not finished:
            words.append(f"{_clock_time(elapsed / progress.done * (progress.total - progress.done))} left")
        self._write(", ".join(filter(None, words)))


def _clock_time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
