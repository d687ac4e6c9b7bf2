"""Processes that are killed while a test loop calibrates lose at most the part that they were at."""

from __future__ import annotations

import random
from pathlib import Path

from tests.support.killing import Killable, ends_the_same


def test_killed_at_random_and_in_a_write_it_ends_with_the_same_bits_and_leaves_nothing(tmp_path: Path) -> None:
    with Killable("integration.openmmlab.killable:classifier") as killable:
        seconds, _ = killable.run(tmp_path / "whole", "stage")
        moment = random.Random(0).uniform(0.5, 0.9) * seconds
        assert ends_the_same(killable, "stage", tmp_path / "whole", tmp_path / "killed", [moment], writes=[0])
        assert not (tmp_path / "killed" / "checkpoint").exists(), "it is gone once all is done"
