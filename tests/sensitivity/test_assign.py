"""The chosen bits are the best ones that a budget allows, and what no bits meet is said with the nearest."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repapq_plugin.errors import ConfigError, ResultError
from repapq_plugin.sensitivity import Assignment, Budget, Sensitivity, choose_bits
from repapq_plugin.sensitivity.table import Option, UnitSensitivity

WIDTHS = (2, 4, 8)


def made(
    weights: list[int], products: list[int], noises: list[list[float]], widths: tuple[int, ...] = WIDTHS
) -> Sensitivity:
    units = [
        UnitSensitivity(
            f"unit{index}",
            count,
            tuple(
                Option((bits, bits), {f"unit{index}.conv": (bits, bits)}, value, value, count * bits, made * bits**2)
                for bits, value in zip(widths, values, strict=True)
            ),
        )
        for index, (count, made, values) in enumerate(zip(weights, products, noises, strict=True))
    ]
    return Sensitivity(tuple(units), other_bytes=100)


def every(sensitivity: Sensitivity) -> list[Assignment]:
    choices = [[option.bits for option in unit.options] for unit in sensitivity.units]
    names = [unit.name for unit in sensitivity.units]
    return [sensitivity.assignment(dict(zip(names, bits, strict=True))) for bits in itertools.product(*choices)]


def allowed(assignment: Assignment, budget: Budget) -> bool:
    return (
        (budget.mean_bits is None or assignment.mean_bits <= budget.mean_bits)
        and (budget.size_bytes is None or assignment.size_bytes <= budget.size_bytes)
        and (budget.bit_operations is None or assignment.bit_operations <= budget.bit_operations)
        and (budget.keep_8bit is None or list(assignment.bits.values()).count((8, 8)) <= budget.keep_8bit)
    )


SIZES = st.lists(st.integers(1, 10**7), min_size=4, max_size=4)
NOISE = st.lists(st.floats(1e-5, 1.0), min_size=3, max_size=3)


@settings(deadline=None, max_examples=60)
@given(
    weights=SIZES,
    products=SIZES,
    noises=st.lists(NOISE, min_size=4, max_size=4),
    mean=st.none() | st.integers(16, 64).map(lambda eighths: eighths / 8),
    share=st.none() | st.floats(0.1, 1.0),
    size=st.none() | st.floats(0.25, 1.0),
    kept=st.none() | st.integers(0, 4),
)
def test_no_other_assignment_within_the_budget_does_less_damage(
    weights: list[int],
    products: list[int],
    noises: list[list[float]],
    mean: float | None,
    share: float | None,
    size: float | None,
    kept: int | None,
) -> None:
    sensitivity = made(weights, products, noises)
    highest = sensitivity.uniform((8, 8))
    operations = None if share is None else share * highest.bit_operations
    byte = None if size is None else int(size * highest.size_bytes)
    if (mean, operations, byte, kept) == (None,) * 4:
        mean = 5.0
    budget = Budget(mean, byte, operations, kept)
    fitting = [assignment for assignment in every(sensitivity) if allowed(assignment, budget)]
    if not fitting:
        with pytest.raises(ConfigError, match="cannot be met"):
            choose_bits(sensitivity, budget)
        return
    found = choose_bits(sensitivity, budget)
    assert allowed(found, budget)
    least = min(assignment.noise for assignment in fitting)
    assert found.noise <= least + 1e-9 * max(max(values) for values in noises)


def test_a_budget_that_is_met_to_the_last_bit_is_met_and_one_bit_less_is_not() -> None:
    weights = [3_000_001, 2_999_999, 17]
    sensitivity = made(weights, [1, 1, 1], [[1.0, 0.1, 0.01]] * 3)
    wanted = sensitivity.assignment({"unit0": (4, 4), "unit1": (2, 2), "unit2": (2, 2)})
    exact = Budget(size_bytes=wanted.size_bytes, bit_operations=wanted.bit_operations)
    assert choose_bits(sensitivity, exact).noise == pytest.approx(wanted.noise)
    less = Budget(size_bytes=wanted.size_bytes, bit_operations=wanted.bit_operations - 1)
    assert choose_bits(sensitivity, less).bit_operations < wanted.bit_operations


@pytest.mark.parametrize(
    ("budget", "nearest"),
    [
        (Budget(mean_bits=1.9), "mean_bits=1.9 cannot be met: the nearest that the measured bit widths reach is 2."),
        (Budget(size_bytes=104), "size_bytes=104 cannot be met: .* is 105."),
        (Budget(bit_operations=79), "bit_operations=79 cannot be met: .* is 80."),
        (
            Budget(mean_bits=4, bit_operations=60),
            "bit_operations=60 cannot be met together with mean_bits=4: .* is 80.",
        ),
    ],
)
def test_a_budget_out_of_reach_is_said_with_the_nearest_that_is_not(budget: Budget, nearest: str) -> None:
    with pytest.raises(ConfigError, match=nearest):
        choose_bits(made([10, 10], [10, 10], [[1.0, 0.1, 0.01]] * 2), budget)


def test_the_nearest_that_is_named_can_be_reached() -> None:
    sensitivity = made([7, 11, 3], [5, 2, 9], [[1.0, 0.1, 0.01]] * 3)
    for key, value in (("mean_bits", 1.0), ("size_bytes", 1), ("bit_operations", 1.0)):
        with pytest.raises(ConfigError) as error:
            choose_bits(sensitivity, Budget(**{key: value}))
        named = float(str(error.value).split("reach is ")[1].split(". Give")[0])
        reached = choose_bits(sensitivity, Budget(**{key: named}))
        assert getattr(reached, key) == pytest.approx(named, abs=1e-4)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "A budget is missing"),
        ({"mean_bits": 0}, "mean_bits=0 is not allowed"),
        ({"mean_bits": math.nan}, "mean_bits=nan is not allowed"),
        ({"bit_operations": True}, "bit_operations=True is not allowed"),
        ({"keep_8bit": -1}, "keep_8bit=-1 is not allowed"),
        ({"keep_8bit": 1.5}, "keep_8bit=1.5 is not allowed; choose a whole number"),
        ({"keep_8bit": 3}, "keep_8bit=3 is not allowed; only 2 units have a choice"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(keys: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_bits(made([1, 1], [1, 1], [[1.0, 0.1, 0.01]] * 2), Budget(**keys))  # type: ignore[arg-type]


def test_units_that_stay_at_8_bits_are_those_that_lose_most() -> None:
    sensitivity = made([1] * 4, [1] * 4, [[0.3, 0.0], [0.9, 0.0], [0.1, 0.0], [0.5, 0.0]], (4, 8))
    kept = [name for name, bits in choose_bits(sensitivity, Budget(keep_8bit=2)).bits.items() if bits == (8, 8)]
    assert kept == ["unit1", "unit3"]
    with pytest.raises(ConfigError, match="keep_8bit=1 needs the width w8a8; measure it too"):
        choose_bits(made([1], [1], [[1.0, 0.1]], (4, 6)), Budget(keep_8bit=1))


def test_unknown_units_and_widths_are_named() -> None:
    sensitivity = made([1, 1], [1, 1], [[1.0, 0.1, 0.01]] * 2)
    with pytest.raises(ConfigError, match="has no unit 'unit9'; units with names like it: unit"):
        sensitivity.assignment({"unit0": (2, 2), "unit9": (2, 2)})
    with pytest.raises(ConfigError, match="say nothing of unit 'unit1'"):
        sensitivity.assignment({"unit0": (2, 2)})
    with pytest.raises(ConfigError, match=r"'unit0' was not measured at bits=\(5, 5\); choose one of w2a2, w4a4, w8a8"):
        sensitivity.uniform((5, 5))


def test_a_table_is_saved_and_read(tmp_path: Path) -> None:
    sensitivity = made([5, 6], [7, 8], [[1.0, 0.1, 0.0]] * 2)
    assert Sensitivity.load(sensitivity.save(tmp_path / "a.json")) == sensitivity
    for text in ("{}", "[]", "no", '{"format": "repapq-sensitivity", "version": 2}'):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(ResultError, match="is not a saved sensitivity"):
            Sensitivity.load(tmp_path / "b.json")


def test_without_the_solver_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ConfigError, match=r"pip install 'repapq-plugin\[sensitivity\]'"):
        choose_bits(made([1], [1], [[1.0, 0.1, 0.01]]), Budget(mean_bits=4))
