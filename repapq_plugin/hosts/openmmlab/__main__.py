"""``python -m repapq_plugin.hosts.openmmlab TOOL ARGS...``: a toolbox's own tool, unchanged, with our names known.

Names of the kind ``repapq_plugin::_base_/repapq_w8a8.py`` and everything in the registries are there before the tool
reads its config. Under a launcher: ``torchrun ... -m repapq_plugin.hosts.openmmlab TOOL ARGS...``.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from repapq_plugin.errors import RepAPQError
from repapq_plugin.hosts.openmmlab.launching import join_group, launcher_in

USAGE = "usage: python -m repapq_plugin.hosts.openmmlab TOOL [ARGUMENTS OF THE TOOL ...]"


def main() -> None:
    """Run the Python file named first on the command line as the main program, with what follows as its arguments.

    Raises:
        SystemExit: With code 2, there is no such file; with code 1, a launcher's environment is half set.
    """
    tool = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    if tool is None or not tool.is_file():
        sys.stderr.write(f"{USAGE}\n" + (f"error: {tool} is not a file\n" if tool is not None else ""))
        raise SystemExit(2)
    try:
        join_group(launcher_in(sys.argv[2:]))
    except RepAPQError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(1) from None
    del sys.argv[0]
    sys.path[0] = str(tool.resolve().parent)
    runpy.run_path(str(tool), run_name="__main__")


if __name__ == "__main__":
    main()
