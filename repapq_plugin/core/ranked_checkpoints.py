"""Finished parts of a work that several ranks do together: rank 0 alone reads and writes the folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from repapq_plugin.core import ranks
from repapq_plugin.core.checkpoints import CheckpointFolder, Checkpoints
from repapq_plugin.core.fingerprints import Fingerprint
from repapq_plugin.core.part_files import Halfway, Load, Record, Tensors
from repapq_plugin.errors import ConfigError


class RankedCheckpoints(Checkpoints):
    """Keeps what `CheckpointFolder` keeps. Every rank calls its methods at the same time.

    Args:
        make: Makes the folder; is called on rank 0.

    Raises:
        RankError: Rank 0 cannot use the folder; there the error says why.
    """

    def __init__(self, make: Callable[[], CheckpointFolder]) -> None:
        self._folder: CheckpointFolder | None = None
        self._finished: Sequence[str] = ()
        self._notes: Sequence[str] = ()
        ranks.first(lambda: setattr(self, "_folder", make()))

    @property
    def finished(self) -> Sequence[str]:
        """See `Checkpoints`."""
        return self._finished

    @property
    def notes(self) -> Sequence[str]:
        """See `Checkpoints`."""
        return self._notes if self._folder is None else self._folder.notes

    @contextmanager
    def opened(self, describe: Callable[[], Fingerprint]) -> Iterator[None]:
        """See `CheckpointFolder`."""
        described = describe()
        with ExitStack() as stack:
            ranks.first(lambda: stack.enter_context(self._mine.opened(lambda: described)))
            self._finished = ranks.first(lambda: self._mine.finished)
            yield

    def once(
        self, name: str, work: Callable[[], Record | None], save: Callable[[], Tensors], load: Callable[[Tensors], None]
    ) -> Record:
        """See `CheckpointFolder`."""
        kept = ranks.first(lambda: self._take(name))
        if kept is not None:
            record, tensors = kept
            load(tensors)
            return record
        record = work() or {}
        if self._folder is not None:
            self._folder.keep(name, record, save)
        return record

    def _take(self, name: str) -> tuple[Record, Tensors] | None:
        held: list[Tensors] = []
        record = self._mine.take(name, lambda _, tensors: held.append(tensors))
        return None if record is None else (record, held[0])

    def halfway(self, name: str) -> Halfway:
        """See `CheckpointFolder`; another number of ranks begins the part anew, as its batches are others."""
        name = f"{name}, on {ranks.world().size} ranks"
        return RankedHalfway(None if self._folder is None else self._folder.halfway(name))

    def remove(self) -> None:
        """See `Checkpoints`."""
        if self._folder is not None:
            self._folder.remove()

    @property
    def _mine(self) -> CheckpointFolder:
        assert self._folder is not None, "rank 0 alone asks for it"
        return self._folder


class RankedHalfway(Halfway):
    """Keeps the state in the middle of a part, on rank 0.

    Args:
        file: What keeps it; ``None`` on other ranks.
    """

    def __init__(self, file: Halfway | None) -> None:
        self._file = file

    def bring_back(self, load: Load) -> None:
        """See `Halfway`."""
        for record, tensors in ranks.first(self._kept):
            load(record, tensors)

    def _kept(self) -> list[tuple[Record, Tensors]]:
        found: list[tuple[Record, Tensors]] = []
        if self._file is not None:
            self._file.bring_back(lambda record, tensors: found.append((record, tensors)))
        return found

    def keep(self, state: Callable[[], tuple[Record, Tensors]]) -> None:
        """See `Halfway`."""
        if self._file is not None:
            self._file.keep(state)


def checkpoints_in(folder: str | Path | None, resume: bool = False) -> Checkpoints:
    """Return what keeps finished parts in a folder, with several ranks on rank 0; what keeps nothing, without a folder.

    Raises:
        ConfigError: ``resume`` without a folder, or a value of another type.
        CheckpointError: See `CheckpointFolder`.
    """
    if not isinstance(resume, bool):
        raise ConfigError(f"resume={resume!r} is not allowed; choose True or False.")
    if folder is None:
        if resume:
            raise ConfigError("resume=True is not allowed without checkpoint_dir, the folder that is gone on from.")
        return Checkpoints()
    if not isinstance(folder, str | Path) or not str(folder):
        raise ConfigError(f"checkpoint_dir={folder!r} is not allowed; choose the path of a folder.")
    if ranks.world().size > 1:
        return RankedCheckpoints(lambda: CheckpointFolder(folder, resume))
    return CheckpointFolder(folder, resume)
