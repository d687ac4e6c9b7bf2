"""Processes that are killed while they calibrate for NNCF lose at most the part that they were at."""

from __future__ import annotations

import random
from pathlib import Path

from tests.support.killing import Killable, ends_the_same


def test_killed_at_random_and_in_a_write_it_ends_with_the_same_bits_and_leaves_nothing(tmp_path: Path) -> None:
    with Killable("integration.nncf.killable:chain") as killable:
        seconds, _ = killable.run(tmp_path / "whole", "stage")
        moments = [random.Random(seed).uniform(0.4, 0.9) * seconds for seed in range(2)]
        assert ends_the_same(killable, "stage", tmp_path / "whole", tmp_path / "killed", moments, writes=[0])
