"""Finished parts of a long work, kept in a folder, so that the work goes on after whatever stopped it.

A folder holds ``checkpoint.json``, which says what the work is, and a safetensors file for each finished part. A file
appears whole or not at all. Nothing in it is run.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from repapq_plugin.core.files import atomically
from repapq_plugin.core.fingerprints import Fingerprint, differences
from repapq_plugin.core.part_files import (
    HALFWAY,
    Halfway,
    HalfwayFile,
    Load,
    PartFiles,
    Record,
    Tensors,
    bring_back,
    write_part,
)
from repapq_plugin.errors import CheckpointError

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the form of a folder; what is written by a newer one is refused."""

FORMAT = "repapq-checkpoint"
MANIFEST, LOCK = "checkpoint.json", "checkpoint.lock"
PARTIALS = (".*.part", ".tmp*")
"""What `atomically`, and safetensors within it, leave if the process is killed while they write."""


class Checkpoints:
    """Keeps nothing; `CheckpointFolder` does. Whoever works calls `once` and need not know which it is given."""

    @property
    def finished(self) -> Sequence[str]:
        """Names of the parts that need not be done again, in order."""
        return ()

    @property
    def notes(self) -> Sequence[str]:
        """What the user should know afterwards."""
        return ()

    @contextmanager
    def opened(self, describe: Callable[[], Fingerprint]) -> Iterator[None]:
        """Keep the parts of one work, for the time of a ``with`` block.

        Args:
            describe: Says what the work depends on.
        """
        yield

    def once(
        self, name: str, work: Callable[[], Record | None], save: Callable[[], Tensors], load: Callable[[Tensors], None]
    ) -> Record:
        """Do a part of the work, unless it was done before: then only bring back what it left.

        Args:
            name: Its name, which no other part has.
            work: Does it, and returns what became of it; ``None`` is an empty record.
            save: Returns all tensors that it may have changed.
            load: Puts tensors like those in their place.
        """
        return work() or {}

    def halfway(self, name: str) -> Halfway:
        """Return what keeps the state in the middle of a part."""
        return Halfway()

    def remove(self) -> None:
        """Delete what is kept: the work is done."""


class CheckpointFolder(Checkpoints):
    """Keeps finished parts in a folder, with the states of torch's random generators behind each.

    Args:
        path: The folder; made if it is missing.
        resume: Go on with what it holds. Without, a folder with finished parts is refused.

    Raises:
        CheckpointError: The folder holds something else, was made by a newer version, cannot be written, or holds
            finished parts that shall not be gone on with.
    """

    def __init__(self, path: str | Path, resume: bool = False) -> None:
        self.path, self.resume = Path(path), resume
        self._files, self._halfway = PartFiles(self.path), self.path / HALFWAY
        self._finished: list[str] = []
        self._next = 0
        self._failed = ""
        try:
            self._check()
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise self._unwritable(error) from error

    @property
    def finished(self) -> Sequence[str]:
        """See `Checkpoints`."""
        return tuple(self._finished)

    @property
    def notes(self) -> Sequence[str]:
        """See `Checkpoints`."""
        return [self._failed] if self._failed else []

    @contextmanager
    def opened(self, describe: Callable[[], Fingerprint]) -> Iterator[None]:
        """See `Checkpoints`.

        Raises:
            CheckpointError: Another process works in the folder, or what it holds is of another work; see the class.
        """
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise CheckpointError(
                f"Another process works in {self.path}; wait for its end, or choose another checkpoint_dir."
            ) from error
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            for partial in self._partials():  # of a process that was killed: no other one works here
                partial.unlink(missing_ok=True)
            self._begin(describe())
            yield
            self._halfway.unlink(missing_ok=True)  # of a part that failed
        except KeyboardInterrupt:
            logger.warning("Interrupted. %s", self.how_to_go_on)
            raise
        finally:
            lock.release()

    @property
    def how_to_go_on(self) -> str:
        """What to do after an interruption, in a sentence."""
        return f"Finished parts in {self.path}: {len(self._finished)}. The same call with resume=True goes on."

    def once(
        self, name: str, work: Callable[[], Record | None], save: Callable[[], Tensors], load: Callable[[Tensors], None]
    ) -> Record:
        """See `Checkpoints`.

        Raises:
            CheckpointError: What is kept of the part is damaged.
        """
        record = self.take(name, lambda _, tensors: load(tensors))
        if record is None:
            record = work() or {}
            self.keep(name, record, save)
        return record

    def take(self, name: str, load: Load) -> Record | None:
        """Bring back what is kept of a part that comes next; return ``None`` if it has to be done; see `once`."""
        if self._finished[self._next : self._next + 1] != [name]:
            return None
        record = bring_back(self._files.path(self._next), load)
        self._next += 1
        return record

    def keep(self, name: str, record: Record, save: Callable[[], Tensors]) -> None:
        """Keep a part that was done; see `once`."""
        # A part that fails leaves no file, and fails again in every process; the files behind it stay in order.
        self._files.drop_from(self._next)
        del self._finished[self._next :]
        self._keep(name, record, save())

    def halfway(self, name: str) -> Halfway:
        """See `Checkpoints`."""
        return Halfway() if self._failed else HalfwayFile(self._halfway, name)

    def remove(self) -> None:
        """See `Checkpoints`."""
        self._files.drop_from(0)
        for path in (self._halfway, self.path / MANIFEST, self.path / LOCK):
            path.unlink(missing_ok=True)
        if self.path.exists() and not any(self.path.iterdir()):
            self.path.rmdir()

    def _check(self) -> Mapping[str, object] | None:
        """Return what the folder says of itself; None if it is new.

        Raises:
            CheckpointError: See the class.
        """
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"checkpoint_dir={str(self.path)!r} is a file; choose a folder.")
        manifest = self.path / MANIFEST
        if not manifest.exists():
            own = {LOCK, *(path.name for path in self._partials())}
            others = sorted(path.name for path in self.path.glob("*") if path.name not in own)
            if others:
                raise CheckpointError(
                    f"{self.path} holds other files than a checkpoint's ({', '.join(others[:3])}); choose an empty "
                    "folder as checkpoint_dir."
                )
            return None
        try:
            said = json.loads(manifest.read_bytes())
            version = said["version"] if said["format"] == FORMAT else None
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{manifest} cannot be read as a checkpoint's ({error}). {self._anew}") from error
        if not isinstance(version, int) or not isinstance(said.get("work"), dict):
            raise CheckpointError(f"{manifest} is not a checkpoint's. {self._anew}")
        if version > VERSION:
            raise CheckpointError(
                f"{self.path} was written by a newer version (form {version}, this one reads {VERSION}); use that "
                "version, or choose another checkpoint_dir."
            )
        if not self.resume and self._files.path(0).exists():
            raise CheckpointError(
                f"{self.path} holds finished parts of an earlier calibration; go on with resume=True (--resume). "
                f"{self._anew}"
            )
        return dict(said["work"])

    def _begin(self, now: Fingerprint) -> None:
        """Compare the work with what the folder holds of it; write down what it is."""
        then = self._check()
        found = self._files.names()
        if then is not None and found and (changed := differences(then, now)):
            raise CheckpointError(
                f"{self.path} holds another calibration, which cannot be gone on with: {'; '.join(changed)}. "
                f"Bring that back, or start anew: delete {self.path} or choose another checkpoint_dir."
            )
        self._finished, self._next = found, 0
        self._files.drop_from(len(found))
        if found:
            logger.info("Finished parts taken from %s: %d.", self.path, len(found))
            return
        self._halfway.unlink(missing_ok=True)
        said = {"format": FORMAT, "version": VERSION, "work": now}
        try:
            with atomically(self.path / MANIFEST) as partial:
                partial.write_text(json.dumps(said, indent=1), encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from error

    def _partials(self) -> list[Path]:
        return [path for pattern in PARTIALS for path in self.path.glob(pattern)]

    def _keep(self, name: str, record: Record, tensors: Tensors) -> None:
        """Write a part. A disk that is full stops the keeping and not the work, which may have taken hours."""
        if self._failed:
            return
        try:
            write_part(self._files.path(self._next), name, record, tensors)
        except (OSError, SafetensorError) as error:
            self._failed = (
                f"From {name!r} on nothing was kept in {self.path} ({error}): an interruption loses what comes after. "
                "Free some space."
            )
            logger.warning(self._failed)
            return
        self._finished.append(name)
        self._next += 1
        self._halfway.unlink(missing_ok=True)  # it was on the way to this part, or to one behind it

    @property
    def _anew(self) -> str:
        return f"To start anew, delete {self.path} or choose another checkpoint_dir."

    def _unwritable(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"checkpoint_dir={str(self.path)!r} cannot be written: {error}. Free some space or choose another folder."
        )
