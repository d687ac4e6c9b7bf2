"""What calibration did to a unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class UnitResult:
    """What calibration did to one unit, measured on held-out batches.

    Args:
        name: Module path.
        stage: Module path of what it was supervised with, or ``network``.
        loss_before: Its relative loss with starting ranges only.
        loss_after: Its relative loss with what was kept.
        kept: Whether something improved on the starting point, and its result stays.
        seconds: Time spent, shared evenly among units that were learned together.
        note: Why something was not kept.
    """

    name: str
    stage: str
    loss_before: float
    loss_after: float
    kept: bool
    seconds: float
    note: str = ""


def joined(first: Sequence[UnitResult], then: Sequence[UnitResult], prefix: str = "") -> list[UnitResult]:
    """Join what units went through first and then.

    Args:
        first: The earlier results; empty where nothing went before.
        then: The later ones, of the same units or some of them.
        prefix: What the later notes begin with.
    """
    if not first:
        return list(then)
    by_name = {result.name: result for result in then}
    return [_continued(result, by_name.get(result.name), prefix) for result in first]


def _continued(first: UnitResult, then: UnitResult | None, prefix: str) -> UnitResult:
    if then is None:
        return first
    return replace(
        first,
        loss_after=then.loss_after,
        kept=first.kept or then.kept,
        seconds=first.seconds + then.seconds,
        note="; ".join(note for note in (first.note, then.note and prefix + then.note) if note),
    )
