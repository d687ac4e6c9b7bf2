"""The bits that fit a budget with the least damage: an integer programme, solved exactly by HiGHS.

One variable for each unit and width says whether the unit gets it. Minimised is the sum of the units' noise; that it is
a sum takes errors of units for independent of each other, so that their squares add (our choice, as others made it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from repapq_plugin.errors import ConfigError
from repapq_plugin.sensitivity.table import Assignment, Option, Sensitivity
from repapq_plugin.sensitivity.widths import EIGHT, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

SCALE = 1e6
"""What the largest noise is scaled to: the solver's absolute tolerances of 1e-6 then mean 1e-12 of it."""


@dataclass(frozen=True)
class Budget:
    """What an assignment may cost at most; each part that is given holds.

    Args:
        mean_bits: Bits of a weight, mean over all quantized weights.
        size_bytes: See `Assignment`.
        bit_operations: See `Assignment`.
        keep_8bit: How many units may keep 8 bits for weights and activations, besides those that are pinned there.

    Raises:
        ConfigError: A value is no positive number, or nothing is given.
    """

    mean_bits: float | None = None
    size_bytes: int | None = None
    bit_operations: float | None = None
    keep_8bit: int | None = None

    def __post_init__(self) -> None:
        said = {key: value for key, value in vars(self).items() if value is not None}
        if not said:
            raise ConfigError(f"A budget is missing; give one of {', '.join(vars(self))}.")
        for key, value in said.items():
            count = key == "keep_8bit"
            number = isinstance(value, int if count else int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0 or (value == 0 and not count):
                wanted = "a whole number of at least 0" if count else "a number above 0"
                raise ConfigError(f"{key}={value!r} is not allowed; choose {wanted}.")


@dataclass(frozen=True)
class _Row:
    """A part of a budget: what each option costs, as whole numbers, and how much all may."""

    key: str
    given: float
    costs: tuple[int, ...]
    limit: int
    unit: float = 1.0
    """One step of a cost, in the budget's own measure."""
    base: int = 0

    def nearest(self, cost: int) -> str:
        """Return a cost in the budget's own measure; never less than it is."""
        value = self.base + cost * self.unit
        return f"{math.ceil(value * 1e4) / 1e4:g}" if self.key == "mean_bits" else f"{math.ceil(value)}"


def choose_bits(sensitivity: Sensitivity, budget: Budget) -> Assignment:
    """Return the assignment of the least noise among those that a budget allows.

    Raises:
        ConfigError: No assignment meets the budget; the message names the nearest that one meets. Or scipy is missing.
    """
    options = [(index, option) for index, unit in enumerate(sensitivity.units) for option in unit.options]
    rows = _rows(sensitivity, budget, [option for _, option in options])
    owners = [index for index, _ in options]
    noise = np.array([option.noise for _, option in options])
    chosen = _solve(noise * (SCALE / max(noise.max(), 1e-300)), owners, rows)
    if chosen is None:
        raise _out_of_reach(owners, rows)
    bits = {sensitivity.units[options[place][0]].name: options[place][1].bits for place in chosen}
    return sensitivity.assignment(bits)


def _rows(sensitivity: Sensitivity, budget: Budget, options: Sequence[Option]) -> list[_Row]:
    weight_bits = tuple(option.weight_bits for option in options)
    rows: list[_Row] = []
    if budget.mean_bits is not None:
        weights = sensitivity.weights
        limit = math.floor(Fraction(str(budget.mean_bits)) * weights)
        rows.append(_Row("mean_bits", budget.mean_bits, weight_bits, limit, 1 / weights))
    if budget.size_bytes is not None:
        limit = 8 * (math.floor(budget.size_bytes) - sensitivity.other_bytes)
        rows.append(_Row("size_bytes", budget.size_bytes, weight_bits, limit, 1 / 8, sensitivity.other_bytes))
    if budget.bit_operations is not None:
        costs = tuple(option.bit_operations for option in options)
        rows.append(_Row("bit_operations", budget.bit_operations, costs, math.floor(budget.bit_operations)))
    if budget.keep_8bit is not None:
        free = [unit for unit in sensitivity.units if not unit.pinned]
        if budget.keep_8bit > len(free):
            raise ConfigError(f"keep_8bit={budget.keep_8bit} is not allowed; only {len(free)} units have a choice.")
        kept = tuple(int(not unit.pinned and o.bits == EIGHT) for unit in sensitivity.units for o in unit.options)
        if not any(kept):
            raise ConfigError(f"keep_8bit={budget.keep_8bit} needs the width {shown(EIGHT)}; measure it too.")
        rows.append(_Row("keep_8bit", budget.keep_8bit, kept, budget.keep_8bit))
    return rows


def _out_of_reach(owners: Sequence[int], rows: Sequence[_Row]) -> ConfigError:
    """Return the error that names the first part of a budget that cannot be met, and the nearest that can."""
    for place, row in enumerate(rows):
        chosen = _solve(np.array(row.costs, dtype=float), owners, rows[:place])
        least = sum(row.costs[index] for index in chosen or ())
        if least > row.limit:
            others = " and ".join(f"{other.key}={other.given:g}" for other in rows[:place])
            return ConfigError(
                f"{row.key}={row.given:.12g} cannot be met{f' together with {others}' if others else ''}: the nearest "
                f"that the measured bit widths reach is {row.nearest(least)}. Give that or more, or measure fewer bits."
            )
    raise AssertionError("each part of the budget can be met, one after the other")


def _solve(objective: NDArray[np.float64], owners: Sequence[int], rows: Sequence[_Row]) -> list[int] | None:
    """Return the places of the chosen options, one for each owner; ``None`` where nothing meets all rows."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise ConfigError("Choosing bits needs scipy: pip install 'repapq-plugin[sensitivity]'") from error
    one_each = np.zeros((max(owners) + 1, len(owners)))
    one_each[owners, range(len(owners))] = 1
    constraints = [LinearConstraint(one_each, 1, 1)]
    for row in rows:
        largest = max(1, *row.costs)  # the solver's tolerances are absolute
        constraints.append(LinearConstraint(np.array(row.costs)[None] / largest, ub=row.limit / largest))
    while True:
        found = milp(
            objective,
            integrality=np.ones(len(owners)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            return None
        chosen = [int(place) for place in np.flatnonzero(found.x > 0.5)]
        if all(sum(row.costs[place] for place in chosen) <= row.limit for row in rows):
            return chosen
        # It met the budget only within the solver's tolerance. Without it, all others remain.
        cut = np.zeros((1, len(owners)))
        cut[0, chosen] = 1
        constraints.append(LinearConstraint(cut, ub=len(chosen) - 1))
