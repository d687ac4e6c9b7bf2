"""What makes one row, and what all of them do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from repapq_plugin.comparison.subject import Judged, Subject
from repapq_plugin.comparison.table import Row
from repapq_plugin.config import RepAPQConfig
from repapq_plugin.errors import ExportError

NETWORKS = "networks"
"""Folder with a folder for each row: the calibrated network and its exported files."""


@dataclass(frozen=True)
class Task:
    """One row that is to be made.

    Args:
        method: Its short name.
        title: What it is called.
        seed: See `Row`.
        make: Makes it; what it raises becomes the row's reason.
    """

    method: str
    title: str
    seed: int | None
    make: Callable[[], Row]


def version() -> str:
    """Return the package's name and version."""
    return f"repapq-plugin {metadata.version('repapq-plugin')}"


def common_scheme(config: RepAPQConfig) -> str:
    """Return the bits and grids that all methods share, in a line."""
    target = config.runs_on
    ends = "" if config.first_last_bits is None else f", first and last layers {config.first_last_bits} bit"
    return (
        f"W{config.weight_bits}A{config.activation_bits}: weights {target.weight_scheme}, "
        f"activations {target.activation_scheme}{ends}"
    )


def own_folder(subject: Subject, name: str, seed: int | None) -> Path:
    """Return the folder of a row, made if it is missing."""
    safe = name.replace(":", "-")
    folder = subject.folder / NETWORKS / (safe if seed is None else f"{safe}-{seed}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def on_runtime(row: Row, subject: Subject, judge: Callable[[], Judged]) -> Row:
    """Return a row with what its network does on the runtime; where it cannot go there, with the reason.

    Args:
        row: Scored so far as it is simulated.
        subject: What is compared.
        judge: Exports it and judges its file.
    """
    if subject.runtime == "none":
        return row
    try:
        found = judge()
    except (ExportError, RuntimeError) as error:  # runtimes raise the latter for what they cannot run
        return row.with_notes(f"not on {subject.runtime}: {error}")
    return replace(
        row,
        integer=found.scores,
        runtime=subject.runtime,
        size_bytes=found.size_bytes,
        latency_ms=found.latency_ms,
        float_ms=found.float_ms,
    ).with_notes(*found.notes)
