"""Closeness: relative to the largest wanted value, strict about everything that cannot be compared."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from repapq_plugin.core.compare import EXACT, ROUNDING, equal_within, relative_error

numbers = st.floats(-1e3, 1e3, allow_nan=False, width=32)
values = st.lists(numbers, min_size=1, max_size=4).map(lambda members: torch.tensor(members, dtype=torch.float64))


@given(st.lists(values, max_size=3))
def test_a_result_is_equal_to_itself(tensors: list[Tensor]) -> None:
    assert relative_error(tensors, tensors) == 0
    assert equal_within(tensors, [tensor.clone() for tensor in tensors], 0.0)


@given(values, st.floats(1e-6, 1.0))
def test_the_error_is_relative_to_the_largest_value(wanted: Tensor, error: float) -> None:
    peak = float(wanted.abs().max())
    assume(peak > 1e-3)
    actual = wanted.clone()
    actual[0] += error * peak
    assert relative_error([actual], [wanted]) == pytest.approx(error, rel=1e-6)
    assert equal_within([actual], [wanted], 1.01 * error) and not equal_within([actual], [wanted], 0.99 * error)


@given(values, values, st.integers(-20, 20))
def test_both_results_may_be_scaled(actual: Tensor, wanted: Tensor, exponent: int) -> None:
    assume(actual.shape == wanted.shape and bool(wanted.any()))
    scale = 2.0**exponent
    assert relative_error([scale * actual], [scale * wanted]) == relative_error([actual], [wanted])


@pytest.mark.parametrize(
    ("actual", "wanted"),
    [
        ([torch.ones(2)], [torch.ones(3)]),
        ([torch.ones(2)], [torch.ones(2), torch.ones(2)]),
        ([torch.tensor([1.0, math.nan])], [torch.ones(2)]),
        ([torch.ones(2)], [torch.tensor([1.0, math.nan])]),
        ([torch.tensor([math.inf])], [torch.tensor([math.inf])]),
        ([torch.ones(1)], [torch.tensor([math.inf])]),
    ],
)
def test_what_cannot_be_compared_is_infinitely_far_apart(actual: list[Tensor], wanted: list[Tensor]) -> None:
    assert relative_error(actual, wanted) == math.inf
    assert not equal_within(actual, wanted, math.inf)


def test_an_all_zero_tensor_has_to_be_met_exactly() -> None:
    zero, nearly = torch.zeros(2), torch.tensor([0.0, 1e-30])
    assert equal_within([zero], [zero]) and not equal_within([nearly], [zero])
    assert relative_error([nearly], [zero]) == pytest.approx(1e-30)


def test_tensors_without_elements_are_equal() -> None:
    assert equal_within([torch.ones(0, 3)], [torch.ones(0, 3)], 0.0)


def test_dtypes_may_differ() -> None:
    assert relative_error([torch.tensor([3], dtype=torch.int32)], [torch.tensor([4.0], dtype=torch.float16)]) == 0.25


def test_exact_is_stricter_than_rounding() -> None:
    assert EXACT < ROUNDING


def test_a_sum_that_nearly_cancels_is_no_better_than_its_terms() -> None:
    wanted = [torch.tensor([1.0])]
    assert equal_within([torch.tensor([1.01])], wanted, terms=1000.0)
    assert not equal_within([torch.tensor([1.01])], wanted, terms=10.0)
    assert not equal_within([torch.tensor([1.01])], wanted)
