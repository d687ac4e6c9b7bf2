"""Tables of what several processes tell each other."""

from __future__ import annotations

import json

from integration.bench.reference import RESULTS
from integration.bench.table_parts import markdown


def ranks_table() -> str:
    """Return what each of several processes gives to collectives."""
    body = []
    for size, found in json.loads((RESULTS / "ranks.json").read_text())["counts"].items():
        steps = [sum(step["bytes"].values()) for step in found["steps"].values()]
        calls = {sum(step["calls"].values()) for step in found["steps"].values()}
        ranges, whole = (sum(found[part]["bytes"].values()) for part in ("ranges", "whole"))
        whole += (300 - found["steps of a part"]) * sum(steps)
        shown = [f"{value / 1e6:.2f}" for value in (max(steps), sum(steps) / len(steps), ranges, whole)]
        body.append([size, ", ".join(map(str, sorted(calls))), *shown])
    return markdown(
        ["processes", "calls a step", "MB a step, largest stage", "mean stage", "MB of passes for ranges", "MB in all"],
        body,
    )


def ring_table() -> str:
    """Return what a ring all-reduce of the largest stage's gradients would take, by the model."""
    model = json.loads((RESULTS / "ranks.json").read_text())["model"]
    body = [
        [
            str(row["ranks"]),
            f"{row['sent'] / 1e6:.2f}",
            *(f"{1000 * row['seconds'][link]:.3f}" for link in model["links"]),
        ]
        for row in model["rows"]
    ]
    return markdown(["ranks", "MB sent by each", *(f"ms, {link}" for link in model["links"])], body)


def ranks_equal_table() -> str:
    """Return how far two processes end from one, and how far one does from itself with images in another order."""
    found = json.loads((RESULTS / "ranks.json").read_text())["equal"]
    body = [
        [name, f"{told['largest']:.1e}", f"{told['median']:.1e}"] for name, told in found.items() if name != "steps"
    ]
    return markdown([f"against one process, {found['steps']} steps", "largest difference", "median"], body)
