from __future__ import annotations

import subprocess
import sys

from repapq_plugin.core.memory import peak_memory

SIZE = 200 * 2**20


def test_the_peak_of_a_process_is_its_own_and_stays_when_the_memory_is_free_again() -> None:
    code = (
        "from repapq_plugin.core.memory import peak_memory\n"
        f"before = peak_memory(); block = bytearray({SIZE}); del block; print(before, peak_memory())"
    )
    held = bytearray(4 * SIZE)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after >= before + 0.9 * SIZE
    assert (peak_memory() or 0) > max(before, len(held))
