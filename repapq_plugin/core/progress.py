"""How far a long work is, told as it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a calibration is.

    Args:
        phase: ``"ranges"`` or ``"calibration"``.
        done: Batches observed, or optimisation steps taken.
        total: How many there will be.
    """

    phase: str
    done: int
    total: int


Report = Callable[[Progress], None]
"""Told as the work goes on."""


def counted(phase: str, total: int, report: Report | None) -> Callable[[], None]:
    """Return what turns its calls into `Progress` reports; the first is made at once."""
    done = -1

    def advance() -> None:
        nonlocal done
        done += 1
        if report is not None:
            report(Progress(phase, done, total))

    advance()
    return advance
