"""Calibration data as it comes in: of one process, or a share of it on each of several ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from repapq_plugin.core import ranks
from repapq_plugin.core.running import Batch
from repapq_plugin.core.tensors import tensors_of
from repapq_plugin.errors import CalibrationError


@dataclass(frozen=True)
class SharedData:
    """What a rank knows of the calibration data.

    Args:
        batches: Its own; none, if it has no data.
        shown: With several ranks, batches that all of them see: the first and the last of the first rank with data.
        notes: What is worth telling with the result.
    """

    batches: Sequence[Batch]
    shown: Sequence[Batch] = ()
    notes: Sequence[str] = ()


def shared_data(data: Iterable[Batch]) -> SharedData:
    """Read the calibration data of this process, and with several ranks exchange what all have to see.

    Raises:
        CalibrationError: There is no batch; with several ranks on none of them.
    """
    given = list(data)
    held = [batch for batch in given if _holds_values(batch)]
    counts = ranks.gather((len(given), len(held)))
    total, full = (sum(numbers) for numbers in zip(*counts, strict=True))
    if not total:
        raise CalibrationError("The calibration data holds no batch; give at least one.")
    batches = held if full else given
    notes = [f"{total - full} of {total} batches hold no value and were left out."] if 0 < full < total else []
    if len(counts) == 1:
        return SharedData(batches, notes=notes)
    numbers = [of_rank[1 if full else 0] for of_rank in counts]
    source = next(rank for rank, number in enumerate(numbers) if number)
    shown = ranks.first(lambda: batches[:1] if len(batches) == 1 else [batches[0], batches[-1]], source)
    without = [str(rank) for rank, number in enumerate(numbers) if not number]
    if without:
        notes.append(f"Rank {', '.join(without)} of {len(counts)} had no calibration data.")
    return SharedData(batches, shown, notes)


def _holds_values(batch: Batch) -> bool:
    tensors = tensors_of(batch)
    return not tensors or any(tensor.numel() for tensor in tensors)
