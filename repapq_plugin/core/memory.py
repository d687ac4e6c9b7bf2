"""How much memory a process has held."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_memory() -> int | None:
    """Return the largest resident memory of this process since its program began, in bytes; ``None`` if unknown.

    Linux says it in ``/proc/self/status``. ``getrusage`` is no substitute there: a child inherits the peak of the
    process that started it.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = (line.split() for line in status.read_text().splitlines())
        return next((int(words[1]) * 1024 for words in lines if words[:1] == ["VmHWM:"]), None)
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
