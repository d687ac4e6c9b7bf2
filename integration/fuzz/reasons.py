"""Names for what refusals say, and the table of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

REASONS = {
    "matches no module of the merged model": "a pattern of the configuration matches nothing after the merge",
    "There is nothing to quantize": "no layer that is quantized is called",
    "cannot be traced to ONNX": "torch's exporter cannot follow the network",
    "The network cannot learn as a whole": "the network cannot learn as a whole",
    "No part of the network can be calibrated": "no part of the network can learn",
    "is not finite": "an activation is not finite",
}
"""Part of a message, and the reason that it gives."""


def reason_of(message: str) -> str:
    """Return the reason that a refusal gives; the message without its details where it is none of those known."""
    for part, reason in REASONS.items():
        if part in message:
            return reason
    return re.sub(r"'[^']*'|\"[^\"]*\"|/\S+|\S*\d\S*|\[[^]]*\]", "…", message)[:160]


def fuzz_table(path: Path) -> str:
    """Return how many random networks ended how, as a Markdown table.

    Args:
        path: What ``integration.bench.fuzz`` wrote.
    """
    found = json.loads(path.read_text())
    ends, refusals = found["ends"], found["refusals"]
    lines = [("random networks", found["networks"]), ("equal to their simulation", ends.get("equal", 0))]
    lines += [(f"refused: {reason}", count) for reason, count in refusals.items()]
    lines += [(f"**{end}**", count) for end, count in ends.items() if end not in ("equal", "refused")]
    return "\n".join(["| ended | networks |", "| --- | --- |", *(f"| {name} | {count:,} |" for name, count in lines)])
