"""Notes that name what they are about, and not too much of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

NAMED = 5
"""How many modules a note names for one reason, and how many reasons."""


def listed(reasons: Mapping[str, str]) -> str:
    """Return what stands in a note of modules and the reason for each: modules of one reason together.

    Of each reason, and of the reasons, the first `NAMED` are named and the others counted.

    Args:
        reasons: Reasons by module path.
    """
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    return "; ".join(_first([f"{', '.join(_first(names))}: {reason}" for reason, names in groups.items()]))


def _first(texts: Sequence[str]) -> list[str]:
    left = len(texts) - NAMED
    return [*texts[:NAMED], f"and {left} more"] if left > 0 else list(texts)
