"""Three small figures: the streaming range search, time per unit of deep networks, and what an import costs.

    python -m integration.bench.figures observers
    python -m integration.bench.figures depth
    python -m integration.bench.figures imports

Seconds are processor time of the process that does the work, on one thread, so that waiting for a busy machine does not
show in them; that others use its caches still does, so each is taken several times. Results go to
``results/figures.json``, each command into its own part.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import click
import torch
from torch import Tensor, nn

from integration.bench.reference import RESULTS, environment, write_result
from repapq_plugin import MAEObserver, RepAPQConfig, quantize_model
from repapq_plugin.core.quant_primitives import choose_qparams
from repapq_plugin.observers.base import RangeObserver

BATCHES, SHAPE = 16, (32, 64, 14, 14)
"""Batches of activations that ranges are searched on, float32."""

FRACTIONS = 100
"""Fractions of the full range that the plain search tries."""

UNITS = (10, 20, 50, 100)
"""Units of the networks whose time per unit is measured."""


def cpu_seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the processor time of a call in seconds, and what it returned."""
    started = time.process_time()
    found = run()
    return time.process_time() - started, found


# -- observers ----------------------------------------------------------------------------------------------------


def activations(seed: int) -> list[Tensor]:
    """Return batches like what stands behind a ReLU: half are zeros, channels differ by factors, tails are long."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.exp(0.8 * torch.randn(1, SHAPE[1], 1, 1, generator=generator))
    found = []
    for _ in range(BATCHES):
        tails = torch.exp(0.5 * torch.randn(SHAPE, generator=generator))
        found.append((torch.randn(SHAPE, generator=generator) * tails * channels).relu())
    return found


def error(x: Tensor, low: Tensor, high: Tensor, bits: int) -> float:
    """Return the mean absolute error of a range on a tensor."""
    scale, zero_point = choose_qparams(low, high, 0, 2**bits - 1, symmetric=False)
    codes = (x / scale).round_().add_(zero_point).clamp_(0, 2**bits - 1)
    return float(codes.sub_(zero_point).mul_(scale).sub_(x).abs_().mean())


def plain_search(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the range of least error among even fractions of the full one, each tried on the raw tensor."""
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    tried = [(low * k / FRACTIONS, high * k / FRACTIONS) for k in range(FRACTIONS, 0, -1)]
    return min(tried, key=lambda bounds: error(x, *bounds, bits))


def streaming_search(batches: list[Tensor], bits: int) -> tuple[Tensor, Tensor, RangeObserver]:
    """Return the range of the package's observer, which sees one batch at a time, and the observer."""
    observer = MAEObserver(quant_min=0, quant_max=2**bits - 1)
    for batch in batches:
        observer(batch)
    return *observer.find_range(), observer


def held_bytes(observer: RangeObserver) -> int:
    """Return how much an observer remembers."""
    return sum(buffer.numel() * buffer.element_size() for buffer in observer.buffers())


def measure_observers(seed: int) -> list[dict[str, Any]]:
    """Return both searches at 8, 6 and 4 bits."""
    batches = activations(seed)
    rows = []
    for bits in (8, 6, 4):
        streaming, (low, high, observer) = cpu_seconds(lambda b=bits: streaming_search(batches, b))
        raw = torch.cat(batches)
        plain, bounds = cpu_seconds(lambda b=bits, r=raw: plain_search(r, b))
        few = streaming_search(batches[:1], bits)[2]
        rows.append(
            {
                "seed": seed,
                "bits": bits,
                "values": raw.numel(),
                "streaming_seconds": streaming,
                "plain_seconds": plain,
                "ratio": plain / streaming,
                "streaming_mae": error(raw, low, high, bits),
                "plain_mae": error(raw, *bounds, bits),
                "held_bytes_1_batch": held_bytes(few),
                "held_bytes_all_batches": held_bytes(observer),
                "raw_bytes": raw.numel() * raw.element_size(),
            }
        )
    return rows


# -- depth --------------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """A stem and equal units of one convolution and a ReLU, then a classifier."""

    def __init__(self, units: int, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.units = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU()) for _ in range(units)
        )
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for unit in self.units:
            x = unit(x)
        return self.fc(x.mean((2, 3)))


def measure_depth(units: int, schedule: str, steps: int) -> dict[str, Any]:
    """Return the processor time of one calibration, all of it, and per unit."""
    torch.manual_seed(0)
    model, batches = Deep(units).eval(), [torch.randn(4, 3, 8, 8) for _ in range(4)]
    config = RepAPQConfig(steps=steps, schedule=schedule)  # type: ignore[arg-type]
    seconds, result = cpu_seconds(lambda: quantize_model(model, batches, config))
    # The stem and the classifier are units as well.
    return {"units": units, "found": len(result.units), "schedule": schedule, "steps": steps, "seconds": seconds}


# -- imports ------------------------------------------------------------------------------------------------------

PROGRAM = "import time; import {}; print(time.process_time())"


def measure_import(name: str) -> float:
    """Return the processor time of a fresh process that imports one package, in seconds; its bytecode is there."""
    written = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", PROGRAM.format(name)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=written)
    return float(done.stdout)


def put(part: str, content: object) -> None:
    """Write one part of the result beside the others."""
    path = RESULTS / "figures.json"
    before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    click.echo(str(write_result("figures", {**before, "environment": environment(), part: content})))


@click.group()
def main() -> None:
    """Measure one of the three, print it and write it."""
    torch.set_num_threads(1)


@main.command()
@click.option("--seeds", default="0,1,2", help="Seeds of the activations, separated by commas.")
def observers(seeds: str) -> None:
    """Compare the streaming MAE search with a plain one on the raw tensor."""
    rows = [row for seed in seeds.split(",") for row in measure_observers(int(seed))]
    for row in rows:
        click.echo(
            f"seed {row['seed']}, {row['bits']} bits: {row['streaming_seconds']:.2f} s against "
            f"{row['plain_seconds']:.2f} s, MAE {row['streaming_mae'] / row['plain_mae']:.4f} of the plain search's"
        )
    put("observers", rows)


@main.command()
@click.option("--steps", default=5, show_default=True, help="Steps of a unit or a stage.")
@click.option("--repeats", default=3, show_default=True, help="How often each is measured.")
def depth(steps: int, repeats: int) -> None:
    """Time calibrations of networks of more and more units."""
    measure_depth(UNITS[0], "stage", steps)  # what is done once in a process
    rows = []
    for _ in range(repeats):
        for schedule in ("unit", "stage"):
            for units in UNITS:
                rows.append(measure_depth(units, schedule, steps))
                click.echo(f"{schedule}, {units} units: {1000 * rows[-1]['seconds'] / rows[-1]['found']:.1f} ms a unit")
    put("depth", rows)


@main.command()
@click.option("--repeats", default=7, show_default=True, help="Fresh processes of each.")
def imports(repeats: int) -> None:
    """Time imports in fresh processes, in turns."""
    names = ("torch", "repapq_plugin")
    for name in names:  # writes the bytecode, and the files are in memory
        measure_import(name)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            seconds[name].append(measure_import(name))
    for name, found in seconds.items():
        click.echo(f"{name}: median {statistics.median(found):.3f} s of {repeats}")
    put("imports", seconds)


if __name__ == "__main__":
    main()
