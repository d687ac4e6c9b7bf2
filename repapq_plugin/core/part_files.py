"""Files of a checkpoint folder: one for each finished part of a work, and one for the state in the middle of a part.

Each holds tensors, a record ready for JSON, and the states of torch's random generators.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from repapq_plugin.core.files import atomically
from repapq_plugin.core.running import random_states, set_random_states
from repapq_plugin.errors import CheckpointError

logger = logging.getLogger(__name__)

HALFWAY = "halfway.safetensors"
"""Name of the file that holds the state in the middle of a part."""

HALFWAY_SECONDS = 60.0
"""How often it is written (our choice: writing takes a small part of that)."""

RANDOM = "random "
"""What the names of states of random generators begin with."""

Record = dict[str, object]
"""What became of a part, ready for JSON."""

Tensors = Mapping[str, Tensor]

Load = Callable[[Record, Tensors], None]
"""Puts what was saved in its place."""


def write_part(path: Path, name: str, record: Record, tensors: Tensors) -> None:
    """Write a file, whole or not at all.

    Raises:
        OSError, SafetensorError: It cannot be written.
    """
    states = {RANDOM + key: state for key, state in random_states().items()}
    # Copies: the format refuses tensors that share their memory.
    copies = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in {**tensors, **states}.items()}
    with atomically(path) as partial:
        save_file(copies, partial, metadata={"name": name, "record": json.dumps(record)})


def bring_back(path: Path, load: Load) -> Record:
    """Bring back what a file holds, and the random generators; return the record.

    Raises:
        CheckpointError: The file is damaged, or does not hold what ``load`` needs.
    """
    _, record, tensors = _read(path, tensors=True)
    states = {key.removeprefix(RANDOM): tensors.pop(key) for key in [*tensors] if key.startswith(RANDOM)}
    try:
        load(record, tensors)
        set_random_states(states)
    except (LookupError, RuntimeError, ValueError, TypeError) as error:
        raise _damaged(path, error) from error
    return record


def _read(path: Path, tensors: bool = False) -> tuple[str, Record, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            found = {key: file.get_tensor(key) for key in file.keys()} if tensors else {}
        return header["name"], dict(json.loads(header["record"])), found
    except (OSError, SafetensorError, LookupError, ValueError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged ({type(error).__name__}: {error}); delete it, and what comes from it on is done again."
    )


class PartFiles:
    """The files of finished parts in a folder, by their number from 0 on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, number: int) -> Path:
        """Return the file of a part."""
        return self.folder / f"part-{number:05d}.safetensors"

    def names(self) -> list[str]:
        """Return the names of the parts that are there, up to the first that is missing.

        Raises:
            CheckpointError: A file is damaged.
        """
        found: list[str] = []
        while self.path(len(found)).exists():
            found.append(_read(self.path(len(found)))[0])
        return found

    def drop_from(self, number: int) -> None:
        """Delete a part and those behind it."""
        for path in self.folder.glob("part-*.safetensors"):
            found = re.fullmatch(r"part-(\d+)\.safetensors", path.name)
            if found is not None and int(found[1]) >= number:
                path.unlink(missing_ok=True)


class Halfway:
    """Keeps nothing in the middle of a part; `HalfwayFile` does."""

    def bring_back(self, load: Load) -> None:
        """Let ``load`` put back what was kept, if anything was."""

    def keep(self, state: Callable[[], tuple[Record, Tensors]]) -> None:
        """Keep what ``state`` returns, if it is time."""


class HalfwayFile(Halfway):
    """Keeps the state in the middle of a part every `HALFWAY_SECONDS`.

    Args:
        path: The file.
        name: Name of the part; what is kept of another one is not brought back.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._last, self._works = time.monotonic(), True

    def bring_back(self, load: Load) -> None:
        """See `Halfway`.

        Raises:
            CheckpointError: The file is damaged.
        """
        if self._path.exists() and _read(self._path)[0] == self._name:
            bring_back(self._path, load)

    def keep(self, state: Callable[[], tuple[Record, Tensors]]) -> None:
        """See `Halfway`. A disk that is full stops the keeping and not the work."""
        if not self._works or time.monotonic() - self._last < HALFWAY_SECONDS:
            return
        try:
            write_part(self._path, self._name, *state())
        except (OSError, SafetensorError) as error:
            logger.warning("The state within %r cannot be kept in %s: %s.", self._name, self._path.parent, error)
            self._works = False
        self._last = time.monotonic()
