"""Timing: turns are taken fairly, and the figures are those of the clock."""

from __future__ import annotations

import time

import pytest

from repapq_plugin.errors import ConfigError
from repapq_plugin.evaluation import measure_latency


def test_candidates_take_turns() -> None:
    calls: list[str] = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    report = measure_latency(runs, rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert report.rounds == 3


def test_figures_are_milliseconds_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: clock[0])
    durations = {"slow": iter([6, 4, 8]), "quick": iter([2, 2, 2])}

    def run(name: str) -> None:
        clock[0] += next(durations[name]) * 1_000_000

    report = measure_latency({n: (lambda n=n: run(n)) for n in durations}, rounds=3, warmup=0)
    assert report.median_ms == {"slow": 6.0, "quick": 2.0}
    assert report.min_ms == {"slow": 4.0, "quick": 2.0}
    assert report.max_ms == {"slow": 8.0, "quick": 2.0}
    assert report.ratios == {("slow", "quick"): 3.0, ("quick", "slow"): pytest.approx(1 / 3)}


def test_repeats_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: clock[0])

    def run() -> None:
        clock[0] += 3_000_000

    assert measure_latency({"a": run}, rounds=2, warmup=0, repeats=4).median_ms == {"a": 3.0}


def test_bad_counts_are_refused() -> None:
    with pytest.raises(ConfigError, match="empty"):
        measure_latency({})
    for key, value in (("rounds", 0), ("warmup", -1), ("repeats", 0)):
        with pytest.raises(ConfigError, match=f"{key}={value}"):
            measure_latency({"a": lambda: None}, **{key: value})
