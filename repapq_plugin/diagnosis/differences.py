"""How far each layer of an exported file is from the simulation, and which first computes something else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIKE = 1e-3
"""What a layer's output may differ by, relative to its largest value, and still be the same (our choice: sums of
float32 in another order differ by about 1e-6)."""


@dataclass(frozen=True)
class LayerDifference:
    """One call of one layer.

    Args:
        layer: Module path in the simulation.
        call: Which call of it, from 0.
        own: Relative error of its output on the runtime's own input: made in this layer.
        arriving: Relative error of its input against the simulation's: made before it.
    """

    layer: str
    call: int
    own: float
    arriving: float


def first_difference(differences: Sequence[LayerDifference], tolerance: float = ALIKE) -> LayerDifference | None:
    """Return the first call that computes something else by itself, if there is one."""
    return next((each for each in differences if each.own > tolerance), None)
