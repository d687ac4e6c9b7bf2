"""The toolboxes' own test tools, run as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from integration.openmmlab.scenes import ROOT


def start_tool(
    toolbox: str, config: Path, checkpoint: Path, folder: Path, *overrides: str, start: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a tool as a user does; ``start`` stands between Python and the tool."""
    spec = find_spec(toolbox)
    assert spec is not None and spec.origin is not None
    tool = Path(spec.origin).parent / ".mim" / "tools" / "test.py"
    command = [sys.executable, *start, str(tool), str(config), str(checkpoint), "--work-dir", str(folder)]
    if overrides:
        command += ["--cfg-options", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def run_tool(
    toolbox: str, config: Path, checkpoint: Path, folder: Path, *overrides: str, start: Sequence[str] = ()
) -> dict[str, Any]:
    """Run a tool as a user does, and return the record it leaves."""
    done = start_tool(toolbox, config, checkpoint, folder, *overrides, start=start)
    assert done.returncode == 0, done.stderr[-3000:]
    record: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return record
