"""Environments of peers: each in a folder of its own, made on demand with ``uv``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from repapq_plugin.core.files import write_atomically
from repapq_plugin.errors import HostError

READY = "ready.json"
"""File in an environment's folder that says what it holds; written once all of it is there."""

TOLD = 600
"""How many of the last characters an error quotes."""


def default_folder() -> Path:
    """Return where environments are kept unless somebody says otherwise: the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "repapq" / "peers"


def python_of(environment: Path) -> Path:
    """Return the interpreter of an environment."""
    return environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def environment_with(name: str, requirements: Sequence[str], folder: Path, python: str = "3.11") -> Path:
    """Return the interpreter of an environment that holds packages; make it where it is not there.

    Args:
        name: Of the folder inside ``folder``.
        requirements: What is installed, as pip takes it; another list makes the environment anew.
        folder: Where environments are kept.
        python: Version of the interpreter.

    Raises:
        HostError: ``uv`` is missing, or could not make it; nothing half made is taken for whole.
    """
    target, wanted = folder / name, {"python": python, "requirements": list(requirements)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(
            f"The folder {folder} for environments of peers cannot be made: {error.strerror or error}. "
            "Choose another with --env-dir."
        ) from error
    with FileLock(folder / f"{name}.lock"):
        if _held(target) == wanted:
            return python_of(target)
        uv = shutil.which("uv")
        if uv is None:
            raise HostError(
                f"The peer {name} needs an environment of its own, which uv makes, and uv is not installed: "
                "pip install uv."
            )
        shutil.rmtree(target, ignore_errors=True)
        _run([uv, "venv", "--quiet", "--python", python, str(target)], name)
        _run([uv, "pip", "install", "--quiet", "--python", str(python_of(target)), *requirements], name)
        write_atomically(target / READY, json.dumps(wanted).encode())
    return python_of(target)


def _held(target: Path) -> object:
    try:
        return json.loads((target / READY).read_bytes())
    except (OSError, ValueError):
        return None


def _run(command: Sequence[str], name: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostError(
            f"The environment of the peer {name} could not be made: {done.stderr[-TOLD:].strip()} "
            "Make room or a connection, and give the same command again."
        )
