"""A calibration in a process of its own: ``python -m repapq_plugin.comparison.child FOLDER``.

A process of its own has its own memory, so that its peak belongs to one method. The folder was made by the process that
started this one, for nobody else: what is unpickled was pickled there.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from repapq_plugin.core.memory import peak_memory
from repapq_plugin.errors import RepAPQError
from repapq_plugin.job import quantize_model

SUBJECT, MEASURED, RESULT = "subject.pt", "measured.json", "repapq.safetensors"
"""Files of the folder: what is to be calibrated; what was measured, or what went wrong; the calibrated network."""

UNREADABLE = 3
"""Exit code where what was pickled cannot be unpickled here."""


def main(folder: Path) -> int:
    """Calibrate what a folder holds, and write into it what came of that."""
    try:
        subject = torch.load(folder / SUBJECT, weights_only=False)
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError, EOFError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return UNREADABLE
    torch.set_num_threads(subject["threads"])
    started = time.process_time()
    try:
        result = quantize_model(subject["model"], subject["batches"], subject["config"])
        seconds = time.process_time() - started
        result.save(folder / RESULT)
    except RepAPQError as error:
        (folder / MEASURED).write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        return 0
    (folder / MEASURED).write_text(json.dumps({"cpu_seconds": seconds, "peak_bytes": peak_memory()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
