"""What every table is made of: rows of the committed results, means, markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from typing import Any

from integration.bench.reference import RESULTS

PRESETS = ("w8a8", "w6a6", "w4a4", "w3a3")
NOTHING = "–"

CLASSIFIERS = {"repvgg": "RepVGG, top-1 %", "mobileone": "MobileOne, top-1 %"}

Row = dict[str, Any]


def rows_of(name: str, part: str = "rows") -> list[Row]:
    """Return a result's rows on the test split, or none if it is not there yet."""
    path = RESULTS / f"{name}.json"
    rows: list[Row] = json.loads(path.read_text()).get(part, []) if path.exists() else []
    return [row for row in rows if row.get("split", "test") == "test"]


def mean_of(values: Iterable[float]) -> str:
    """Return mean and sample standard deviation of percentages."""
    values = list(values)
    if not values:
        return NOTHING
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def markdown(header: list[str], body: list[list[str]]) -> str:
    """Return a table."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
