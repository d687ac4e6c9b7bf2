"""The table of a comparison: its rows, and how they are kept, written and counted together."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from repapq_plugin.core.files import write_atomically
from repapq_plugin.errors import ResultError

FORMAT, VERSION = "repapq-comparison", 1

TABLE_FILE, CSV_FILE = "comparison.json", "comparison.csv"
"""Files of a comparison's folder."""


@dataclass(frozen=True)
class Row:
    """One method with one seed.

    Args:
        method: Its short name; of a peer ``peer:method``.
        title: What it is called.
        by: Who did it, with the version.
        scheme: What was quantized how, in a line.
        seed: Seed of the learning; ``None`` where nothing depends on it.
        settings: Where it differs from the defaults; of a peer what it was told.
        simulated: Scores of the simulated network, by metric.
        integer: Scores of the exported network on ``runtime``.
        runtime: What ran it in integers; empty: nothing did.
        weight_bits: Bits of a weight, mean over all quantized weights; of a peer what it was told.
        activation_bits: Bits of the layers' inputs, mean over the layers; likewise.
        size_bytes: Size of the file or files that the runtime read.
        packed_bytes: Weights packed without gaps, all else in float32.
        cpu_seconds: Seconds of processor time that the calibration took, all threads together.
        peak_bytes: Largest resident memory of the process that calibrated, libraries and model included.
        latency_ms: Milliseconds of one sample on ``runtime``, median.
        float_ms: The same of the float network, in turns with it.
        notes: What is worth knowing.
        failed: Why there are no figures; empty where there are.
        impossible: ``failed`` is for good: trying again changes nothing.
    """

    method: str
    title: str
    by: str
    scheme: str
    seed: int | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    simulated: Mapping[str, float] = field(default_factory=dict)
    integer: Mapping[str, float] = field(default_factory=dict)
    runtime: str = ""
    weight_bits: float | None = None
    activation_bits: float | None = None
    size_bytes: int | None = None
    packed_bytes: int | None = None
    cpu_seconds: float | None = None
    peak_bytes: int | None = None
    latency_ms: float | None = None
    float_ms: float | None = None
    notes: tuple[str, ...] = ()
    failed: str = ""
    impossible: bool = False

    @property
    def key(self) -> tuple[str, int | None]:
        """What a folder finds it by."""
        return self.method, self.seed

    def with_notes(self, *notes: str) -> Row:
        """Return a copy that says more."""
        return replace(self, notes=(*self.notes, *filter(None, notes)))


@dataclass(frozen=True)
class Summary:
    """One method over all its seeds.

    Args:
        row: Its first row that has figures, or the first.
        seeds: How many rows have figures.
        simulated: Mean and sample standard deviation (0 for one seed) of each metric.
        integer: Likewise.
        cpu_seconds: Mean.
        peak_bytes: Largest.
    """

    row: Row
    seeds: int
    simulated: Mapping[str, tuple[float, float]]
    integer: Mapping[str, tuple[float, float]]
    cpu_seconds: float | None
    peak_bytes: int | None


@dataclass(frozen=True)
class Comparison:
    """Methods side by side.

    Args:
        scheme: Bits and grids that all share, in a line.
        calibration: The calibration data, in a line.
        floats: Scores of the float network, by metric.
        metrics: Which of the metrics a table shows, and how they are called there; the first decides.
        rows: In the order of the table.
        subject: What the comparison depends on (`core.fingerprints`).
        versions: Of what took part.
        machine: What ran it, in a line.
    """

    scheme: str
    calibration: str
    floats: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, str] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()
    subject: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: str = ""

    def row(self, method: str, seed: int | None) -> Row | None:
        """Return a row, if there is one."""
        return next((row for row in self.rows if row.key == (method, seed)), None)

    def with_row(self, row: Row) -> Comparison:
        """Return a copy with a row more, or in the place of the one with its method and seed."""
        others = [known for known in self.rows if known.key != row.key]
        if len(others) == len(self.rows):
            return replace(self, rows=(*self.rows, row))
        return replace(self, rows=tuple(row if known.key == row.key else known for known in self.rows))

    def drop(self, scores: Mapping[str, float]) -> dict[str, float]:
        """Return by how much each metric of the float network is larger; of metrics that both have."""
        return {key: self.floats[key] - value for key, value in scores.items() if key in self.floats}

    def summaries(self) -> list[Summary]:
        """Return each method once, its seeds together."""
        found = []
        for method in dict.fromkeys(row.method for row in self.rows):
            rows = [row for row in self.rows if row.method == method]
            whole = [row for row in rows if not row.failed]
            seconds = [row.cpu_seconds for row in whole if row.cpu_seconds is not None]
            peaks = [row.peak_bytes for row in whole if row.peak_bytes is not None]
            found.append(
                Summary(
                    (whole or rows)[0],
                    len(whole),
                    _spread([row.simulated for row in whole]),
                    _spread([row.integer for row in whole]),
                    statistics.mean(seconds) if seconds else None,
                    max(peaks, default=None),
                )
            )
        return found

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``comparison.json`` with all of it and ``comparison.csv`` with a line for each row.

        Raises:
            ExportError: A file cannot be written.
        """
        said = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        files = {TABLE_FILE: json.dumps(said, indent=1, allow_nan=False) + "\n", CSV_FILE: self.csv()}
        for name, text in files.items():
            write_atomically(Path(folder) / name, text.encode())
        return [Path(folder) / name for name in files]

    def csv(self) -> str:
        """Return a line for each row; scores and drops have a column for each metric."""
        text = io.StringIO()
        plain = [item.name for item in dataclasses.fields(Row) if item.name not in ("simulated", "integer", "settings")]
        metrics = list(self.metrics)
        kinds = ("simulated", "integer", "drop")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*plain, *(f"{kind} {metric}" for kind in kinds for metric in metrics), "float", "settings"])
        for row in self.rows:
            values = [getattr(row, name) for name in plain]
            scores = (row.simulated, row.integer, self.drop(row.simulated or row.integer))
            cells = [found.get(metric) for found in scores for metric in metrics]
            floats = json.dumps({metric: self.floats.get(metric) for metric in metrics})
            told = [" ".join(value) if isinstance(value, tuple) else value for value in values]
            writer.writerow([*told, *cells, floats, json.dumps(dict(row.settings), default=str)])
        return text.getvalue()

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Read what `save` wrote: the folder, or its ``comparison.json``.

        Raises:
            ResultError: The file is missing or is something else.
        """
        path = Path(path) / TABLE_FILE if Path(path).is_dir() else Path(path)
        try:
            said = json.loads(path.read_bytes())
            if (said.pop("format"), said.pop("version")) != (FORMAT, VERSION):
                raise ValueError("another format or version")
            rows = [Row(**{**row, "notes": tuple(row["notes"])}) for row in said.pop("rows")]
            return cls(**said, rows=tuple(rows))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ResultError(f"{path} is not a saved comparison ({error}); compare again.") from error


def _spread(scores: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    keys = dict.fromkeys(key for each in scores for key in each)
    values = {key: [each[key] for each in scores if key in each] for key in keys}
    return {
        key: (statistics.mean(found), statistics.stdev(found) if len(found) > 1 else 0.0)
        for key, found in values.items()
    }


def finite(scores: object, name: str = "score") -> dict[str, float]:
    """Return scores by metric, whatever said them; what is no finite number is left out.

    Args:
        scores: A number, or a mapping of metrics to numbers.
        name: What a number alone is called.
    """
    said = scores if isinstance(scores, Mapping) else {name: scores}
    numbers = {str(key): float(value) for key, value in said.items() if hasattr(value, "__float__")}
    return cast("dict[str, float]", {key: value for key, value in numbers.items() if math.isfinite(value)})
