"""Kills calibrations at random moments and counts how many end, gone on with, as if nothing had happened.

For each way in (`quantize_model`, `RepAPQTestLoop`, NNCF) and each schedule, ``--kills`` processes are killed, each at
a moment drawn over the whole time of a calibration that nobody interrupted, and each calibration is gone on with by
another process. A kill counts as survived if all tensors and the record of all units have the same bits, and no
temporary file of this package is left. (mmengine reads a config by a copy, which stays if it is killed just then.)

``python -m integration.bench.kills`` writes ``results/kills.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from tests.support.killing import Killable, ends_the_same

RESULTS = Path(__file__).with_name("results") / "kills.json"

ENTRIES = {
    "plain": "tests.support.killing:plain",
    "OpenMMLab": "integration.openmmlab.killable:classifier",
    "NNCF": "integration.nncf.killable:chain",
}
SCHEDULES = ("unit", "stage", "network")


def survived(killable: Killable, schedule: str, kills: int, folder: Path, seed: int) -> dict[str, object]:
    """Kill ``kills`` calibrations of one schedule.

    Returns:
        ``survived`` and ``kills``; how many of them came before the end of the work (``before_the_end``); ``seconds``
        of a whole calibration; what was wrong with the others (``wrong``).
    """
    drawn, wrong, early = random.Random(f"{schedule}{seed}"), list[str](), 0
    times = [killable.run(folder / f"whole{index}", schedule)[0] for index in range(2)]
    for index in range(kills):
        moment = drawn.uniform(0, min(times))
        try:
            early += ends_the_same(killable, schedule, folder / "whole0", folder / str(index), [moment])
        except AssertionError as error:
            wrong.append(f"{moment:.3f} s: {error}")
        shutil.rmtree(folder / str(index))
    return {
        "kills": kills,
        "survived": kills - len(wrong),
        "before_the_end": early,
        "seconds": round(min(times), 2),
        "wrong": wrong,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="kills of each entry and schedule")
    parser.add_argument("--entries", nargs="+", choices=ENTRIES, default=list(ENTRIES))
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    words = parser.parse_args(arguments)
    # What is not measured again stays.
    found: dict[str, dict[str, object]] = json.loads(words.out.read_text())["entries"] if words.out.exists() else {}
    for name in words.entries:
        found.setdefault(name, {})
        with Killable(ENTRIES[name]) as killable, tempfile.TemporaryDirectory() as folder:
            for schedule in words.schedules:
                found[name][schedule] = survived(killable, schedule, words.kills, Path(folder) / schedule, words.seed)
                print(name, schedule, found[name][schedule], flush=True)
    record = {
        "entries": found,
        "seed": words.seed,
        "machine": {"processor": platform.machine(), "threads": 1},
        "versions": {name: metadata.version(name) for name in ("torch", "safetensors", "filelock")},
    }
    words.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
