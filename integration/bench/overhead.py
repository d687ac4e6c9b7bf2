"""What share of a default calibration is spent in checks, on the RepVGG classifier.

    python -m integration.bench.overhead

A check is what a calibration would give the same result without: that merged blocks and folded norms compute what they
did, that conditioning changed nothing, that quantizers that are off leave the float network, that learning made the
whole network no worse, and that batches are copied before a network may change them. Each is timed from outside, by the
wall; a check inside another one counts once, for itself. Results go to ``results/overhead.json``.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import click

from integration.bench.reference import calibration_batches, environment, forward, load_classifier, write_result
from repapq_plugin import RepAPQConfig, quantize_model

CHECKS: dict[str, tuple[str, ...]] = {
    "merged blocks compute what they did": (
        "repapq_plugin.reparam.merge:_verified",
        "repapq_plugin.reparam.by_algebra.merge:verified",
        "repapq_plugin.reparam.by_algebra.merge:error_on_images",
    ),
    "folded norms give what they gave": ("repapq_plugin.reparam.fold:_Folder._judged",),
    "conditioning changed nothing": (
        "repapq_plugin.conditioning.judge:Judge.__init__",
        "repapq_plugin.conditioning.judge:Judge.guilty",
    ),
    "quantizers that are off leave the float network": ("repapq_plugin.job:Job._differing_when_off",),
    "learning made the whole network no worse": ("repapq_plugin.job:Job._whole_error",),
    "batches are copied": ("repapq_plugin.job:own_batch",),
}
"""What is timed for each check: modules and the names that are looked up there."""


class Timer:
    """Adds up the wall time of kinds of calls; while one runs inside another, the outer one's clock stands still."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(CHECKS, 0.0)
        self.calls = dict.fromkeys(CHECKS, 0)
        self._running: list[str] = []
        self._since = 0.0

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def timed(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, whose calls count as ``kind``."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._running.append(kind)
            self.calls[kind] += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._running.pop()

        return call


@contextmanager
def timing() -> Iterator[Timer]:
    """Time every check that runs inside."""
    timer = Timer()
    with ExitStack() as stack:
        for kind, places in CHECKS.items():
            for place in places:
                module, _, path = place.partition(":")
                owner: Any = importlib.import_module(module)
                *outer, name = path.split(".")
                for part in outer:
                    owner = getattr(owner, part)
                stack.enter_context(mock.patch.object(owner, name, timer.timed(kind, getattr(owner, name))))
        yield timer


def measure(model_name: str, config: RepAPQConfig) -> dict[str, Any]:
    """Calibrate once and return how long it took, and each check in it."""
    model = load_classifier(model_name)
    batches = calibration_batches(model)
    with timing() as timer:
        started = time.perf_counter()
        result = quantize_model(model, batches, config, forward_fn=forward)
        total = time.perf_counter() - started
    return {
        "model": model_name,
        "scheme": config.scheme,
        "steps": config.steps,
        "seed": config.seed,
        "units": len(result.units),
        "seconds": round(total, 2),
        "checks": {kind: round(seconds, 3) for kind, seconds in timer.seconds.items()},
        "calls": timer.calls,
        "share": round(sum(timer.seconds.values()) / total, 5),
    }


@click.command()
@click.option("--model", default="repvgg", help="Which classifier.")
@click.option("--preset", default="w8a8", help="Which bits.")
@click.option("--steps", type=int, help="Fewer steps than the default, to try.")
@click.option("--name", default="overhead", help="Results go to results/<name>.json.")
def main(model: str, preset: str, steps: int | None, name: str) -> None:
    """Measure, print one line per check, and write the result."""
    config = RepAPQConfig.from_preset(preset)
    row = measure(model, config if steps is None else config.replace(steps=steps))
    for kind, seconds in row["checks"].items():
        share = 100 * seconds / row["seconds"]
        click.echo(f"{kind:48s} {seconds:8.2f} s  {share:6.2f} %  ({row['calls'][kind]} calls)")
    click.echo(f"together {100 * row['share']:.2f} % of {row['seconds']} s, {row['steps']} steps")
    click.echo(str(write_result(name, {"environment": environment(), "rows": [row]})))


if __name__ == "__main__":
    main()
