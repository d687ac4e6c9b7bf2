"""Random networks of fixed seeds, and those that once found a fault: each is equal to its simulation, or refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache

import pytest
import torch

from integration.fuzz.check import put_to_the_test
from integration.fuzz.networks import drawn
from tests.support.comparing import equal_numbers, numbers

SEEDS = range(20)
"""Always run; `integration.bench.fuzz` runs thousands."""

KEPT = {
    67: "a matrix that a layer flattens was no integer weight in a file",
    93: "the same among branches",
    70: "a convolution with one output channel could not learn",
    86: "a linear layer with one output could not learn",
}
"""Seeds that found a fault, which is mended."""


ended = cache(put_to_the_test)


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_network_is_equal_to_its_simulation_or_refused(seed: int) -> None:
    ending = ended(seed)
    assert ending.good, f"{ending.end} in {ending.stage!r}: {ending.reason}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", KEPT)
def test_a_network_that_once_found_a_fault_is_equal_to_its_simulation(seed: int) -> None:
    ending = ended(seed)
    assert ending.end == "equal", f"{KEPT[seed]}: {ending.end} in {ending.stage!r}: {ending.reason}"


def test_a_seed_gives_the_same_network_and_batches_each_time() -> None:
    for seed in range(5):
        one, other = drawn(seed), drawn(seed)
        assert equal_numbers(numbers(one.model), numbers(other.model)) and one.keys == other.keys
        assert repr(one.model) == repr(other.model) and repr(one.batches) == repr(other.batches)
        torch.rand(3)


def test_most_networks_are_not_refused() -> None:
    ends = [ended(seed).end for seed in SEEDS]
    assert ends.count("equal") >= 0.7 * len(SEEDS)
