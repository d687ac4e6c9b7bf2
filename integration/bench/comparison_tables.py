"""Tables of methods and other tools side by side, and of small figures."""

from __future__ import annotations

import json
import statistics

from integration.bench.reference import RESULTS
from integration.bench.table_parts import CLASSIFIERS, NOTHING, Row, markdown, mean_of, rows_of


def comparison_table() -> str:
    """Return every method and peer on the classifiers: scores, what lies below float, time and memory."""
    body = []
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows_of("compare"):
        groups.setdefault((row["model"], row["preset"], row["steps"], row["images"], row["method"]), []).append(row)
    for (model, preset, steps, images, method), rows in groups.items():
        first = rows[0]
        if method == "float":
            continue
        title = f"{CLASSIFIERS[model]}, float {first['float']:.2f}, {images:,} images, {steps} steps a stage"
        done = [row for row in rows if "failed" not in row]
        scores = {kind: [row[kind]["top-1 %"] for row in done if kind in row] for kind in ("simulated", "integer")}
        drop = [row["float"] - score for row, score in zip(done, scores["simulated"], strict=True)]
        seconds = [row["cpu_seconds"] for row in done if "cpu_seconds" in row]
        memory = [row["peak_bytes"] / 1e6 for row in done if "peak_bytes" in row]
        told = first["title"] if done else f"{first['title']}: {first['failed']}"
        body.append(
            [
                title,
                preset.upper(),
                told,
                *(mean_of(values) for values in (scores["simulated"], scores["integer"], drop)),
                f"{statistics.mean(seconds):.1f}" if seconds else NOTHING,
                f"{max(memory):.0f}" if memory else NOTHING,
            ]
        )
    return markdown(["", "bits", "method", "simulated", "OpenVINO", "drop", "CPU s", "peak MB"], body)


def figures_of(part: str) -> list[Row]:
    """Return one part of the small figures."""
    rows: list[Row] = json.loads((RESULTS / "figures.json").read_text()).get(part, [])
    return rows


def observers_table() -> str:
    """Return the streaming range search beside a plain one."""
    body, rows = [], figures_of("observers")
    for bits in dict.fromkeys(row["bits"] for row in rows):
        found = [row for row in rows if row["bits"] == bits]
        seconds = (statistics.mean(row[key] for row in found) for key in ("streaming_seconds", "plain_seconds"))
        quality = [row["streaming_mae"] / row["plain_mae"] for row in found]
        held = (f"{found[0][key] / 1000:,.0f}" for key in ("held_bytes_1_batch", "held_bytes_all_batches", "raw_bytes"))
        cells = [*(f"{value:.2f}" for value in seconds), f"{min(row['ratio'] for row in found):.1f}"]
        body.append([str(bits), *cells, f"{min(quality):.4f} to {max(quality):.4f}", *held])
    head = ["bits", "streaming, CPU s", "plain, CPU s", "times as fast, at least", "MAE by the plain one's"]
    return markdown([*head, "kB held, 1 batch", "16 batches", "raw values"], body)


def depth_table() -> str:
    """Return processor time per unit of networks of more and more units, the least of the repeats."""
    body, rows = [], figures_of("depth")
    units = list(dict.fromkeys(row["units"] for row in rows))
    for schedule in dict.fromkeys(row["schedule"] for row in rows):
        least = [
            min(row["seconds"] / row["found"] for row in rows if (row["schedule"], row["units"]) == (schedule, n))
            for n in units
        ]
        body.append([schedule, *(f"{1000 * value:.0f}" for value in least), f"{least[-1] / least[0]:.2f}"])
    ends = f"{units[-1]} by {units[0]}" if units else ""
    return markdown(["CPU ms a unit, schedule", *(f"{n} units" for n in units), ends], body)


def imports_table() -> str:
    """Return what importing the package costs beside torch."""
    found: dict[str, list[float]] = json.loads((RESULTS / "figures.json").read_text())["imports"]
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    body = [
        [f"`import {name}`", f"{value:.3f}", f"{100 * (value / medians['torch'] - 1):+.1f} %"]
        for name, value in medians.items()
    ]
    return markdown(["", "CPU s, median", "beside torch"], body)
