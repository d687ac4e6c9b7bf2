"""Our own methods: one row for each method and seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from repapq_plugin.comparison.apart import calibrate_apart
from repapq_plugin.comparison.methods import Method
from repapq_plugin.comparison.subject import Subject
from repapq_plugin.comparison.table import Row
from repapq_plugin.comparison.tasks import Task, common_scheme, on_runtime, own_folder, version
from repapq_plugin.config import RepAPQConfig
from repapq_plugin.quantizers.layers import weight_of
from repapq_plugin.result import CalibrationResult


def own_tasks(subject: Subject, methods: Mapping[str, Method], seeds: Sequence[int]) -> list[Task]:
    """Return a task for each method and seed; for one that learns nothing a single one."""
    tasks = []
    for name, method in methods.items():
        learns = not method.reason and bool(method.config(subject.scheme).steps)
        for seed in seeds if learns else (None,):
            tasks.append(Task(name, method.title, seed, partial(own_row, subject, name, method, seed)))
    return tasks


def own_row(subject: Subject, name: str, method: Method, seed: int | None) -> Row:
    """Calibrate, score and export one of our methods.

    Raises:
        RepAPQError: It cannot be done.
    """
    if method.reason:
        return Row(name, method.title, "", common_scheme(subject.scheme), seed, failed=method.reason, impossible=True)
    config = method.config(subject.scheme, seed or 0)
    defaults = RepAPQConfig().to_dict()
    folder = own_folder(subject, name, seed)
    done = calibrate_apart(subject.model, subject.batches, config, folder)
    weight_bits, activation_bits = mean_bits(done.result)
    row = Row(
        name,
        method.title,
        version(),
        config.scheme,
        seed,
        {key: value for key, value in config.to_dict().items() if value != defaults.get(key) and key != "seed"},
        simulated=subject.score(done.result.model),
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        packed_bytes=packed_bytes(done.result),
        cpu_seconds=done.cpu_seconds,
        peak_bytes=done.peak_bytes,
    ).with_notes(*done.result.notes, done.note)
    return on_runtime(row, subject, lambda: subject.judge(done.result, folder / "network"))


def mean_bits(result: CalibrationResult) -> tuple[float, float]:
    """Return the bits of a weight, mean over all quantized weights, and of an input, mean over the layers."""
    sizes = {name: weight_of(result.model.get_submodule(name)).numel() for name in result.layers}
    weights = sum(result.layers[name][0] * size for name, size in sizes.items()) / max(1, sum(sizes.values()))
    return weights, sum(bits for _, bits in result.layers.values()) / max(1, len(result.layers))


def packed_bytes(result: CalibrationResult) -> int:
    """Return the bytes of all weights packed without gaps, of all other parameters in float32, and of the scales."""
    total = 0
    seen: set[int] = set()
    layers = {name: result.model.get_submodule(name) for name in result.layers}
    for name, layer in layers.items():
        weight = weight_of(layer)
        if id(weight) not in seen:
            seen.add(id(weight))
            total += -(-weight.numel() * result.layers[name][0] // 8)
    others = sum(4 * value.numel() for value in result.model.parameters() if id(value) not in seen)
    return total + others
