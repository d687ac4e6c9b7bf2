"""Processes that are killed in the middle of a calibration lose at most the part that they were at."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.killing import Killable, ends_the_same, leftovers


@pytest.fixture(scope="module")
def killable() -> Iterator[Killable]:
    with Killable("tests.support.killing:plain") as killable:
        yield killable


@pytest.mark.parametrize("schedule", ["unit", "stage", "network"])
def test_killed_twice_at_random_it_ends_with_the_same_bits_and_leaves_nothing(
    killable: Killable, schedule: str, tmp_path: Path
) -> None:
    seconds, ended = killable.run(tmp_path / "whole", schedule)
    assert ended and leftovers(tmp_path / "whole") == []
    drawn = random.Random(schedule)
    moments = [drawn.uniform(0.2, 0.9) * seconds for _ in range(2)]
    ends_the_same(killable, schedule, tmp_path / "whole", tmp_path / "killed", moments)


def test_killed_in_the_middle_of_writes_it_ends_with_the_same_bits_and_leaves_nothing(
    killable: Killable, tmp_path: Path
) -> None:
    killable.run(tmp_path / "whole", "stage")
    for write in (0, 2):
        assert not killable.run(tmp_path / "killed", "stage", write=write)[1]
        left = leftovers(tmp_path / "killed")
        assert any("checkpoint/.part" in name for name in left)
    assert any("tmp/repapq-cache" in name for name in left), "and activations that went to disk"
    assert len(list((tmp_path / "killed" / "checkpoint").glob("part-*"))) == 2
    assert ends_the_same(killable, "stage", tmp_path / "whole", tmp_path / "killed", writes=[1]) == 1
