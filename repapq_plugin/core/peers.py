"""The other processes at one work: a beat tells that a rank lives, and who waits for one that has ended stops.

A collective of ``torch.distributed`` waits for every rank, for half an hour by default, and says of a broken connection
only that it is broken. So each rank counts up in a store of torch's, and looks who does not any more.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from repapq_plugin.errors import RankError

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
"""Time between two beats."""

SILENT_SECONDS = 30.0
"""A rank without a beat for so long has ended; it may be held up for a while by a function that lets no thread run."""

BROKEN_SECONDS = 5.0
"""The same once a connection is broken."""

ARRIVAL_SECONDS = 600.0
"""How long ranks wait for the last one to begin: one may have more data to load."""

AT_ONCE = 2e-4
"""Seconds for which a collective is waited for without a pause."""


class Work(Protocol):
    """A collective that has been started."""

    def is_completed(self) -> bool:
        """Whether it has ended, well or not."""

    def wait(self) -> object:
        """Wait for its end, and raise what went wrong."""


class Peers:
    """The ranks of one work, as one of them sees them.

    Args:
        rank: Its own rank.
        size: How many there are.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._store: Store | None = None
        self._thread: threading.Thread | None = None
        self._lost = ""
        self._patience = SILENT_SECONDS
        self._last_words = ""
        self._leaving = threading.Event()
        self._deadline: float | None = None

    def meet(self, gather: Callable[[object], list[object]]) -> None:
        """Wait for all ranks, and begin to watch them.

        Args:
            gather: Returns what each rank gives.

        Raises:
            RankError: Not all have come.
        """
        self._deadline = time.monotonic() + ARRIVAL_SECONDS
        hosts = gather(socket.gethostname())
        self._deadline = None
        where: tuple[str, int] | None = None
        if self.rank == 0:
            name = "127.0.0.1" if len(set(hosts)) == 1 else os.environ.get("MASTER_ADDR") or socket.gethostname()
            try:
                self._store = _store(name, 0, True)
                where = name, self._store.port
            except RuntimeError as error:
                logger.warning("Ranks that end are noticed late: no store can be made (%s).", error)
        found = gather(where)[0]
        if not isinstance(found, tuple):
            return
        if self.rank:
            try:
                self._store = _store(str(found[0]), int(found[1]), False)
            except RuntimeError as error:
                logger.warning("Ranks that end are noticed late: %s:%s cannot be reached (%s).", *found, error)
        self._beat(0)
        if all(gather(self._store is not None)):
            self._thread = threading.Thread(target=self._watch, name="repapq-peers", daemon=True)
            self._thread.start()

    def wait(self, work: Work) -> None:
        """Wait for a collective as long as all ranks live.

        Raises:
            RankError: A rank has ended or failed; the message says which.
        """
        started = time.monotonic()
        pause = 0.0
        while not work.is_completed():
            now = time.monotonic()
            if self._lost:
                raise self._error()
            if self._deadline is not None and now > self._deadline:
                raise RankError(
                    f"Not all of {self.size} ranks have come within {ARRIVAL_SECONDS:g} s. Every rank of a process "
                    "group has to call this; for one alone, call it inside repapq_plugin.core.ranks.alone()."
                )
            if now - started > AT_ONCE:
                pause = min(pause * 1.5 + 2e-5, 0.01)
                time.sleep(pause)
        try:
            work.wait()
        except RuntimeError as error:
            self._patience = BROKEN_SECONDS
            until = time.monotonic() + SILENT_SECONDS
            while self._thread is not None and not self._lost and time.monotonic() < until:
                time.sleep(0.05)
            raise self._error() from error

    def leave(self, reason: str = "") -> None:
        """Stop watching; with a reason the others learn why this rank stops."""
        self._last_words = reason
        self._leaving.set()
        if self._thread is not None:
            self._thread.join(SILENT_SECONDS)

    def _error(self) -> RankError:
        who = self._lost or "A rank has ended, nobody knows which: a connection is broken."
        return RankError(f"{who} The others stop. What was finished is kept in checkpoint_dir; resume=True goes on.")

    def _watch(self) -> None:
        """Beat, and look at the others' beats; runs in a thread of its own."""
        seen = {rank: (b"", time.monotonic()) for rank in range(self.size)}
        count = 0
        while not self._leaving.wait(BEAT_SECONDS):
            count += 1
            try:
                self._beat(count)
                self._look(seen)
            except RuntimeError:
                if not self._leaving.is_set():
                    self._lost = self._lost or "Rank 0 has ended."
                return
        try:
            self._say_goodbye()
        except RuntimeError:
            return  # rank 0, which has the store, has ended

    def _look(self, seen: dict[int, tuple[bytes, float]]) -> None:
        assert self._store is not None
        now = time.monotonic()
        if self._store.check(["lost"]):
            self._lost = self._lost or self._store.get("lost").decode()
        for rank, beat in enumerate(self._store.multi_get([f"beat {rank}" for rank in range(self.size)])):
            if beat != seen[rank][0]:
                seen[rank] = beat, now
            elif beat != b"left" and now - seen[rank][1] > self._patience and not self._lost:
                self._tell(f"Rank {rank} has ended.")

    def _tell(self, words: str) -> None:
        """Say why the work ends, unless another rank has said it already."""
        assert self._store is not None
        self._lost = self._store.compare_set("lost", "", words).decode() or words

    def _say_goodbye(self) -> None:
        assert self._store is not None
        if self._last_words and not self._lost:
            self._tell(f"Rank {self.rank} stopped: {self._last_words.strip().rstrip('.')}.")
        self._store.set(f"beat {self.rank}", "left")
        if self.rank == 0:  # the store goes with it
            until = time.monotonic() + BROKEN_SECONDS
            names = [f"beat {rank}" for rank in range(self.size)]
            while time.monotonic() < until and any(beat != b"left" for beat in self._store.multi_get(names)):
                time.sleep(0.02)

    def _beat(self, count: int) -> None:
        if self._store is not None:
            self._store.set(f"beat {self.rank}", str(count))


def _store(host: str, port: int, is_master: bool) -> TCPStore:
    return TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=timedelta(seconds=30))
