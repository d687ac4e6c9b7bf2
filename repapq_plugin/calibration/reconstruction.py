"""The optimisation of one subject (a unit, a stage, the network) against the float network, with its guard."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from repapq_plugin.calibration.across_block import across_block_loss
from repapq_plugin.calibration.trace import hooked
from repapq_plugin.config import RepAPQConfig
from repapq_plugin.layers import QuantizedLayer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outputs:
    """What a pass over one batch gave: each unit's outputs by call, and those at the end of the stage."""

    units: Mapping[str, Sequence[Tensor]]
    stage: Sequence[Tensor]


class Subject(Protocol):
    """What is optimised together."""

    name: str
    layers: Mapping[str, QuantizedLayer]

    def student(self, batch: int) -> Outputs:
        """Run the quantized network's part on cached inputs of ``batch``."""

    def teacher(self, batch: int) -> Outputs:
        """Return the float network's outputs for ``batch``."""


@dataclass(frozen=True)
class Outcome:
    """What an optimisation did, measured on held-out batches.

    Args:
        unit_losses_before: Relative loss of each unit at its starting point.
        unit_losses_after: The same with what was kept.
        kept: Whether the result was better than its starting point and therefore stays.
        seconds: Time spent.
        note: Why a result was not kept, or what else is worth saying.
    """

    unit_losses_before: dict[str, float]
    unit_losses_after: dict[str, float]
    kept: bool
    seconds: float
    note: str = ""


def split_batches(count: int, guard_fraction: float) -> tuple[list[int], list[int]]:
    """Return indices of training and of held-out batches.

    A single batch, or no guard, leaves nothing to hold out: the result is judged on what it learned from.
    """
    held_out = max(1, round(count * guard_fraction)) if guard_fraction and count > 1 else 0
    training = list(range(count - held_out))
    return training, list(range(count - held_out, count)) or training


def parameter_groups(
    layers: Mapping[str, QuantizedLayer], magnitudes: Mapping[str, float], config: RepAPQConfig
) -> list[dict[str, Any]]:
    """Return Adam's parameter groups, each with its learning rate in real units.

    Args:
        layers: The layers that learn, by module path.
        magnitudes: Mean absolute output of each, by module path.
        config: Holds the rates in grid steps.
    """
    rates = config.learning_rates
    groups: list[dict[str, Any]] = []
    for name, layer in layers.items():
        quantizer, magnitude = layer.weight_fake_quant, magnitudes[name]
        step = float(quantizer.scale.detach().mean())
        relative_step = step / max(float(layer.weight.detach().abs().mean()), step)
        groups.append({"params": [layer.weight], "lr": rates.weight * step})
        if layer.bias is not None:
            groups.append({"params": [layer.bias], "lr": rates.weight * relative_step * magnitude})
        groups.append({"params": [quantizer.log_scale], "lr": rates.scale / quantizer.quant_max})
        if layer.affine is not None:
            rate = rates.affine / quantizer.quant_max
            groups.append({"params": [layer.affine.gamma], "lr": rate})
            groups.append({"params": [layer.affine.beta], "lr": rate * magnitude})
    inputs = {id(layer.input_fake_quant): layer.input_fake_quant for layer in layers.values()}
    for quantizer in inputs.values():
        groups.append({"params": [quantizer.log_scale], "lr": rates.scale / quantizer.quant_max})
    return groups


@torch.no_grad()
def output_magnitudes(subject: Subject, batch: int) -> dict[str, float]:
    """Return the mean absolute output of each layer of ``subject`` on one batch."""
    found = dict.fromkeys(subject.layers, 1.0)

    def recorder(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            found[name] = float(output.abs().mean())

        return hook

    with hooked([layer.register_forward_hook(recorder(name)) for name, layer in subject.layers.items()]):
        subject.student(batch)
    return found


def reconstruct(subject: Subject, batches: int, config: RepAPQConfig, advance: Callable[[], None]) -> Outcome:
    """Minimise the across-block loss of ``subject`` and keep the result if held-out batches agree.

    Args:
        subject: What is optimised.
        batches: Number of cached batches.
        config: Steps, learning rates, loss, guard.
        advance: Called after each step.
    """
    started = time.perf_counter()
    training, held_out = split_batches(batches, config.guard_fraction)
    before, parts_before = evaluate(subject, held_out, config)
    snapshot = _snapshot(subject.layers)
    note = _optimise(subject, training, config, advance)
    after, parts_after = evaluate(subject, held_out, config)
    kept = math.isfinite(after) and after < before
    if not kept:
        _restore(subject.layers, snapshot)
        note = note or f"held-out loss went from {before:.4g} to {after:.4g}: the starting point stays"
        logger.info("%s: %s", subject.name, note)
        parts_after = parts_before
    return Outcome(parts_before, parts_after, kept, time.perf_counter() - started, note)


def _optimise(subject: Subject, training: list[int], config: RepAPQConfig, advance: Callable[[], None]) -> str:
    groups = parameter_groups(subject.layers, output_magnitudes(subject, training[0]), config)
    learned: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
    for parameter in learned:
        parameter.requires_grad_(True)
    # One kernel per group: a network has many small ones, and their Python loop costs a tenth of a step.
    optimizer = torch.optim.Adam(groups, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.steps)
    generator = torch.Generator().manual_seed(config.seed)
    order: list[int] = []
    set_dropping(subject.layers, True)
    try:
        for step in range(config.steps):
            order = order or [training[i] for i in torch.randperm(len(training), generator=generator).tolist()]
            batch = order.pop()
            with torch.enable_grad():
                loss, _ = _loss(subject, batch, config)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
            if not math.isfinite(float(loss.detach())):
                return f"the loss became {float(loss.detach())} at step {step}: the starting point stays"
            optimizer.step()
            schedule.step()
            advance()
    finally:
        set_dropping(subject.layers, False)
        for parameter in learned:
            parameter.requires_grad_(False)
            parameter.grad = None
    return ""


def _loss(subject: Subject, batch: int, config: RepAPQConfig) -> tuple[Tensor, dict[str, float]]:
    target, output = subject.teacher(batch), subject.student(batch)
    return across_block_loss(output.units, target.units, output.stage, target.stage, config.loss, config.stage_weight)


@torch.no_grad()
def evaluate(subject: Subject, batches: Sequence[int], config: RepAPQConfig) -> tuple[float, dict[str, float]]:
    """Return the mean loss over ``batches`` and each unit's mean part of it."""
    total, parts = 0.0, dict.fromkeys(subject.teacher(batches[0]).units, 0.0)
    for batch in batches:
        loss, by_unit = _loss(subject, batch, config)
        total += float(loss) / len(batches)
        for name, part in by_unit.items():
            parts[name] += part / len(batches)
    return total, parts


def set_dropping(layers: Mapping[str, QuantizedLayer], enabled: bool) -> None:
    """Let input quantizers drop values at random (only while learning, and only if configured)."""
    for layer in layers.values():
        layer.input_fake_quant.train(enabled)


def _snapshot(layers: Mapping[str, QuantizedLayer]) -> dict[str, dict[str, Tensor]]:
    return {name: {key: value.clone() for key, value in layer.state_dict().items()} for name, layer in layers.items()}


def _restore(layers: Mapping[str, QuantizedLayer], snapshot: Mapping[str, dict[str, Tensor]]) -> None:
    for name, layer in layers.items():
        layer.load_state_dict(snapshot[name])
