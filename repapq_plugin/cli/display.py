"""What the command shows: bars on stderr while there is work, results on stdout, and the rest in a log file."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from repapq_plugin.core.progress import ESTIMATE, Progress, ProgressLines, Report

if TYPE_CHECKING:
    from repapq_plugin.cli.doctor import Diagnosis
    from repapq_plugin.hosts.openmmlab.record import Record

LOG_FILE = "repapq.log"
"""File in the work folder that takes what the toolbox and the libraries print."""

OFF_TERMINAL_WIDTH = 120
"""Columns of a table that goes into a file or a pipe."""


def results_console() -> Console:
    """Return a console on what is stdout now: while a toolbox works, ``sys.stdout`` is the log file."""
    width = None if sys.stdout.isatty() else OFF_TERMINAL_WIDTH
    return Console(file=sys.stdout, width=width, highlight=False)


class Display:
    """Bars on stderr while there is work, results on stdout; where stderr is no terminal, a line every ten seconds.

    Attributes:
        seconds: Wall clock of each step, by its name.
    """

    def __init__(self) -> None:
        self._show(results_console(), Console(file=sys.stderr))
        self._hidden = False
        self.seconds: dict[str, float] = {}

    def hide(self) -> None:
        """Show nothing from now on, and log nothing: of several processes one shows."""
        silent = Console(quiet=True)
        self._show(silent, silent)
        self._hidden = True

    def _show(self, out: Console, err: Console) -> None:
        self._out, self._err = out, err
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=self._err,
        )

    @contextlib.contextmanager
    def step(self, name: str, text: str) -> Iterator[Report]:
        """Show one bar, and note how long it took under ``name``; yields what is told of the progress."""
        # On stdout, which is the log file for the time of the work.
        click.echo(f"{text} ...")
        task = self._bars.add_task(text, total=None, detail="")
        lines = ProgressLines(lambda line: self._err.print(f"{text}: {line}", markup=False, soft_wrap=True))

        def report(progress: Progress) -> None:
            if progress.phase == ESTIMATE:
                click.echo(f"{text}: {progress.part}")
                self._err.print(f"{text}: {progress.part}", markup=False, soft_wrap=True)
                return
            self._bars.update(task, completed=progress.done, total=progress.total, detail=progress.detail)
            if not self._err.is_terminal:
                lines(progress)

        started = time.perf_counter()
        yield report
        self.seconds[name] = time.perf_counter() - started
        total = self._bars.tasks[task].total or 1
        self._bars.update(task, completed=total, total=total, detail="")

    @contextlib.contextmanager
    def working(self, folder: Path) -> Iterator[None]:
        """Show bars, and send what toolboxes print to the work folder's log file."""
        path = Path(os.devnull) if self._hidden else folder / LOG_FILE
        with path.open("w", buffering=1) as log, self._bars, _into(log):
            yield

    def line(self, text: str) -> None:
        """Show one line of a result."""
        self._out.print(text, markup=False, soft_wrap=True)

    def table(self, table: Table) -> None:
        """Show a table of results."""
        self._out.print(table)

    def comparison(self, record: Record, notes: Sequence[str] = ()) -> None:
        """Show what was scored side by side, then the notes and the files."""
        from repapq_plugin.hosts.openmmlab.pages import scored_rows
        from repapq_plugin.report.table import comparison_table

        rows, headings = scored_rows(record)
        self._out.print(comparison_table(rows, headings, record.scheme, record.latency.get("how", "")))
        for note in filter(None, notes):
            self._out.print(f"note: {note}", markup=False)
        for name, paths in record.files.items():
            self.line(f"wrote {name}: {', '.join(paths)}")


@contextlib.contextmanager
def _into(log: IO[str]) -> Iterator[None]:
    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: IO[str] | None = None,
        line: str | None = None,
    ) -> None:
        log.write(warnings.formatwarning(message, category, filename, lineno, line))

    handler = logging.StreamHandler(log)
    logger = logging.getLogger("repapq_plugin")
    logger.addHandler(handler)
    try:
        with contextlib.redirect_stdout(log), warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)


def show_diagnosis(diagnosis: Diagnosis, processor: str, accelerators: Mapping[str, str]) -> None:
    """Show what is installed, what can be done with it, and what to do about the rest.

    Args:
        diagnosis: What `examine` found.
        processor: How this processor adds products of 8 bits; shown where torch works.
        accelerators: What else torch can run on, and what it is called; shown there as well.
    """
    from repapq_plugin.cli.doctor import KNOWN

    out = results_console()
    table = Table("package", "version", "distribution", "state")
    faulty = {problem.package for problem in diagnosis.problems}
    for name in KNOWN:
        package = diagnosis.packages.get(name)
        if package is None:
            table.add_row(name, "-", "-", "not installed")
            continue
        operators = "" if name != "mmcv" else "no operators" if package.operators else "with operators"
        state = "see below" if name in faulty else ", ".join(word for word in ("ok", operators) if word)
        table.add_row(name, package.version, ", ".join(package.distributions), state)
    out.print(table)
    lines = []
    if "torch" in diagnosis.packages and "torch" not in faulty:
        lines.append(f"processor: {processor}")
        lines += [f"accelerator: {device}, {called}" for device, called in accelerators.items()]
    lines += [f"works: {feature}" for feature in diagnosis.works]
    for feature, names in diagnosis.missing.items():
        remedies = dict.fromkeys(KNOWN[name] for name in names if name not in diagnosis.packages)
        how = f" ({'; '.join(remedies)})" if remedies else ""
        lines.append(f"not available: {feature}: {', '.join(names)} missing or faulty{how}")
    for text, remedy in dict.fromkeys((problem.text, problem.remedy) for problem in diagnosis.problems):
        lines.append(f"problem: {text}\n  remedy: {remedy}")
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)
