"""Fair timing: candidates take turns, so that whatever slows the machine down slows all of them."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from repapq_plugin.errors import ConfigError


@dataclass(frozen=True)
class LatencyReport:
    """Milliseconds of one run, by name of the candidate.

    Args:
        median_ms: Median over the rounds.
        min_ms: Fastest round.
        max_ms: Slowest round.
        ratios: ``(a, b)`` -> median over the rounds of the time of ``a`` by the time of ``b`` in the
            same round; above 1 means that ``b`` is faster.
        rounds: Number of rounds timed.
    """

    median_ms: Mapping[str, float]
    min_ms: Mapping[str, float]
    max_ms: Mapping[str, float]
    ratios: Mapping[tuple[str, str], float]
    rounds: int


def measure_latency(
    runs: Mapping[str, Callable[[], object]], *, rounds: int = 50, warmup: int = 5, repeats: int = 1
) -> LatencyReport:
    """Time candidates side by side: A B C, then B C A, ...

    Args:
        runs: What to time, by name; called without arguments.
        rounds: Number of rounds, at least 1; each runs every candidate.
        warmup: Rounds before them that are not timed.
        repeats: Calls of one candidate that are timed together in a round (their mean counts), for
            candidates that are too quick for the clock.

    Raises:
        ConfigError: Nothing to time, or a count out of range.
    """
    if not runs:
        raise ConfigError("runs={} is empty; give at least one callable to time.")
    for key, value, least in (("rounds", rounds, 1), ("warmup", warmup, 0), ("repeats", repeats, 1)):
        if value < least:
            raise ConfigError(f"{key}={value} is not allowed; choose at least {least}.")
    for run in list(runs.values()) * warmup:
        run()
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        start = i % len(names)  # nobody always runs behind the same one, with its leftovers in the caches
        for name in names[start:] + names[:start]:
            begin = time.perf_counter_ns()
            for _ in range(repeats):
                runs[name]()
            times[name].append((time.perf_counter_ns() - begin) / 1e6 / repeats)
    ratios = {
        (a, b): statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))
        for a, b in itertools.permutations(names, 2)
    }
    return LatencyReport(
        median_ms={name: statistics.median(times[name]) for name in names},
        min_ms={name: min(times[name]) for name in names},
        max_ms={name: max(times[name]) for name in names},
        ratios=ratios,
        rounds=rounds,
    )
