"""Notes that name what they are about, and not too much of it."""

from __future__ import annotations

from collections.abc import Mapping

NAMED = 5
"""How many modules a note names."""


def listed(reasons: Mapping[str, str], joint: str = " ") -> str:
    """Return the first `NAMED` modules of a note, each with its reason, and how many there are besides.

    Args:
        reasons: Reasons by module path.
        joint: What stands between a module and its reason.
    """
    named = [f"{name}{joint}{reason}" for name, reason in list(reasons.items())[:NAMED]]
    left = len(reasons) - len(named)
    return "; ".join([*named, f"and {left} more"] if left else named)
