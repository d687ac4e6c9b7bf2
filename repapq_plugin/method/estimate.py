"""What a calibration will take, said before it starts: activations that are cached, memory, time.

Sizes are those of one batch, times the number of batches; time is that of one pass of the float network, times how many
passes there will be. What does not depend on the network (a busy machine, a slow disk) is not in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.copies import samples_in
from repapq_plugin.core.hooks import Hooks, unseen
from repapq_plugin.core.progress import ESTIMATE, Progress
from repapq_plugin.core.running import Batch
from repapq_plugin.core.tensors import first_tensor, tensors_of
from repapq_plugin.method.partition import Stage
from repapq_plugin.method.sites import WeightSite

STEP_PASSES = 6.0
"""Passes of the float network that a step takes as long as: forward, backward, and rounding in both."""

RANGE_PASSES = 4.0
"""Passes that a batch takes while ranges are found: its histograms are most of it."""

KEPT_IN_STEP = 4.0
"""How often the outputs of layers are held in a step: inputs, rounded ones, and gradients of both."""

KEPT_OF_LEARNERS = 5.0
"""How often what learns at once is held besides the network: gradient, two moments, two copies to go back to."""


@dataclass(frozen=True)
class Sizes:
    """What one batch takes in the float network, in bytes by module path, and how long it takes.

    Args:
        read: What modules are called with, all calls together; ``""`` is the network.
        returned: What they return.
        seconds: Of one pass.
    """

    read: Mapping[str, int]
    returned: Mapping[str, int]
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """What a calibration will take.

    Args:
        cached: Bytes of activations that are kept at once, at most.
        budget: Bytes of them that may stay in memory.
        memory: Bytes at the peak: networks, calibration data, one step, and activations in memory.
        seconds: How long it takes.
    """

    cached: int
    budget: int
    memory: int
    seconds: float

    @property
    def progress(self) -> Progress:
        """This as it is told while the work goes on."""
        return Progress(ESTIMATE, 0, 0, str(self))

    def __str__(self) -> str:
        spilled = max(0, self.cached - self.budget)
        where = f"{_size(self.cached - spilled)} of them in memory (cache_bytes), {_size(spilled)} on disk"
        return (
            f"activations {_size(self.cached)}, {where if spilled else 'all in memory'}; memory at the peak about "
            f"{_size(self.memory)}; time about {timedelta(seconds=max(1, round(self.seconds)))}"
        )


def measure(model: nn.Module, names: Sequence[str], run: Callable[[], object]) -> Sizes:
    """Run a network twice on a batch, and note what modules read and return.

    Args:
        model: The network.
        names: Module paths of what is noted.
        run: Makes a pass without gradients.
    """
    run()  # the first pass is slow: libraries choose their ways
    started = time.perf_counter()
    outputs = tensors_of(run())
    if outputs and outputs[0].numel():
        outputs[0].reshape(-1)[0].item()  # an accelerator has ended by then
    seconds = time.perf_counter() - started
    read, returned = dict.fromkeys(names, 0), dict.fromkeys(names, 0)

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
            with unseen():
                given = first_tensor(args, kwargs)
                read[name] += 0 if given is None else _bytes(given)
                returned[name] += sum(map(_bytes, tensors_of(output)))

        return hook

    with Hooks() as hooks:
        for name in names:
            hooks.after(model.get_submodule(name), note(name), with_kwargs=True)
        run()
    return Sizes(read, returned, seconds)


@torch.no_grad()
def estimate_job(
    networks: tuple[nn.Module, nn.Module],
    stages: Sequence[Stage],
    config: RepAPQConfig,
    batches: Sequence[Batch],
    weights: Mapping[str, WeightSite],
    forward: Callable[[Batch], object],
    steps: int,
) -> Estimate:
    """Return what a calibration will take, by a few passes of the float network.

    Args:
        networks: The float network and the quantized one.
        stages: All stages, in call order.
        config: The configuration.
        batches: Calibration batches of this process.
        weights: Quantized weights, by the module path of their layer.
        forward: Makes a pass of the float network.
        steps: Optimisation steps of all parts together.
    """
    names = [name for stage in stages for unit in stage.units for name in (stage.name, unit.name, *unit.layers)]
    sizes = measure(networks[0], ["", *dict.fromkeys(names)], lambda: forward(batches[0]))
    samples = [samples_in(batch) for batch in batches]
    like_first = sum((count or 1) / (samples[0] or 1) for count in samples) if all(samples) else float(len(batches))
    data = bytes_of([tensor for batch in batches for tensor in tensors_of(batch)])
    held = data + sum(bytes_of([*network.parameters(), *network.buffers()]) for network in networks)
    learned = {name: bytes_of(list(site.layer.parameters())) for name, site in weights.items()}
    return estimate(sizes, stages, config, like_first, len(batches), learned, held, steps)


def estimate(
    sizes: Sizes,
    stages: Sequence[Stage],
    config: RepAPQConfig,
    batches: float,
    seen: int,
    learned: Mapping[str, int],
    held: int,
    steps: int,
) -> Estimate:
    """Return what a calibration will take.

    Args:
        sizes: What one batch takes.
        stages: All stages, in call order.
        config: Schedule, steps and budget.
        batches: How many batches like that there are; views come on top.
        seen: How many batches ranges are found on.
        learned: Bytes of what learns, by the module path of a layer.
        held: Bytes of both networks and of the calibration data.
        steps: Optimisation steps of all parts together.
    """
    batches *= config.views
    cached = _cached(sizes, stages, config, batches)
    by_stage = [[name for unit in stage.units for name in unit.layers] for stage in stages]
    at_once = [sum(by_stage, [])] if config.schedule == "network" or config.network_steps else by_stage
    activations = max((sum(sizes.returned.get(name, 0) for name in part) for part in at_once), default=0)
    parameters = max((sum(learned.get(name, 0) for name in part) for part in at_once), default=0)
    memory = held + KEPT_IN_STEP * activations + KEPT_OF_LEARNERS * parameters + sum(learned.values())
    # Each part is one of so many, and takes that share of a pass.
    parts = 1 if config.schedule == "network" else max(1, sum(len(stage.learned(config.schedule)) for stage in stages))
    passes = steps / parts * STEP_PASSES + seen * RANGE_PASSES
    if config.schedule != "network":
        passes += 3 * batches * min(len(stages), 2)
    return Estimate(
        round(cached), config.cache_bytes, round(memory + min(cached, config.cache_bytes)), passes * sizes.seconds
    )


def _cached(sizes: Sizes, stages: Sequence[Stage], config: RepAPQConfig, batches: float) -> float:
    """Return how many bytes of activations are kept at once, at most, in the order in which the method keeps them."""
    most, finished = 0, 0
    for stage in stages if config.schedule != "network" or config.solve else ():
        read, returned = sizes.read[stage.name], sizes.returned[stage.name]
        units = [sizes.returned[unit.name] for unit in stage.units if unit.name != stage.name]
        # Those of the quantized network are kept for the units behind them.
        inside = sum(units) + (sum(units) if config.schedule == "unit" else sum(units[:-1]) if config.solve else 0)
        most = max(most, finished + inside + max(2 * read + returned, read + 2 * returned))
        finished += 2 * returned
    if config.schedule == "network" or config.network_steps:
        most = max(most, sizes.returned[""] + sum(sizes.returned[unit.name] for s in stages for unit in s.units))
    return most * batches


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Return how many bytes tensors take together; one that comes twice counts once."""
    return sum(_bytes(tensor) for tensor in {id(tensor): tensor for tensor in tensors}.values())


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
