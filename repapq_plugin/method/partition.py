"""Units and stages: what is reconstructed, and what is supervised together (found, not listed by hand)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from repapq_plugin.policy import check_patterns
from repapq_plugin.quantizers.trace import Trace
from repapq_plugin.reparam.merge import MergedBlock

MAX_STAGE_SHARE = 0.5
"""A container of more than this share of all units is a trunk to look into, not a stage (our choice)."""


@dataclass(frozen=True)
class Unit:
    """A merged block, or a plain layer with what belongs to it alone (its norm, its activation).

    Args:
        name: Module path of the unit.
        layers: Module paths of its quantized layers, in call order.
    """

    name: str
    layers: tuple[str, ...]

    @property
    def part(self) -> str:
        """What it is called where it learns by itself."""
        return f"unit {self.name}"


@dataclass(frozen=True)
class Stage:
    """Units that are supervised together at the output of the module ``name``."""

    name: str
    units: tuple[Unit, ...]

    @property
    def part(self) -> str:
        """What it is called where it learns at once."""
        return f"stage {self.name}"

    def learned(self, schedule: str) -> Sequence[Stage | Unit]:
        """Return what learns one after the other under a schedule of units or stages."""
        by_unit = schedule == "unit" and [unit.name for unit in self.units] != [self.name]
        return self.units if by_unit else (self,)


def is_inside(name: str, container: str) -> bool:
    """Whether the module path ``name`` is ``container`` or lies below it."""
    return not container or name == container or name.startswith(container + ".")


def ancestors(name: str) -> list[str]:
    """Return ``name`` and the module paths above it, innermost first, without the root."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def find_units(model: nn.Module, trace: Trace, layers: Collection[str], patterns: Sequence[str] = ()) -> list[Unit]:
    """Group the quantized ``layers`` of ``model`` into units, in call order.

    A unit is a module that matches ``patterns``, else the merged block around a layer, else the
    outermost module that holds just this layer and maps one tensor to one tensor.

    Raises:
        ConfigError: A pattern matches no module.
    """
    ordered = [name for name in trace.layers if name in layers]
    named = _matching(model, patterns, "units")
    modules = dict(model.named_modules())
    owner: dict[str, str] = {}
    for name in ordered:
        chain = ancestors(name)
        around = [a for a in chain if a in named] or [a for a in chain if isinstance(modules[a], MergedBlock)]
        owner[name] = around[-1] if around else _climb(name, chain, ordered, trace)
    grouped: dict[str, list[str]] = {}
    for name in ordered:
        grouped.setdefault(owner[name], []).append(name)
    return [Unit(name, tuple(members)) for name, members in grouped.items()]


def find_stages(model: nn.Module, trace: Trace, units: Sequence[Unit], patterns: Sequence[str] = ()) -> list[Stage]:
    """Group ``units`` into stages, in call order; a unit in no stage is a stage of its own.

    A stage is the outermost module that is called once with one tensor, returns one, and holds at
    least two but not more than half of all units; a larger one is split where it can be.

    Raises:
        ConfigError: A pattern matches no module.
    """
    chosen = _matching(model, patterns, "stages") if patterns else _split(_containers(trace, units), "", units)
    by_stage: dict[str, list[Unit]] = {}
    for unit in units:
        around = [name for name in ancestors(unit.name) if name in chosen]
        by_stage.setdefault(around[-1] if around else unit.name, []).append(unit)
    return [Stage(name, tuple(members)) for name, members in by_stage.items()]


def _containers(trace: Trace, units: Sequence[Unit]) -> dict[str, int]:
    """Return candidates for stages with the number of units that each holds."""
    held: dict[str, int] = {}
    for unit in units:
        for name in ancestors(unit.name)[1:]:
            held[name] = held.get(name, 0) + 1
    return {
        name: count
        for name, count in held.items()
        if count >= 2
        and name in trace.modules
        and trace.modules[name].calls == 1
        and trace.modules[name].tensor_to_tensor
    }


def _split(containers: dict[str, int], root: str, units: Sequence[Unit]) -> set[str]:
    """Return the stages below ``root``: outermost containers, looked into while they are trunks."""
    inside = [name for name in containers if name != root and is_inside(name, root)]
    outermost = [name for name in inside if not any(name != other and is_inside(name, other) for other in inside)]
    stages: set[str] = set()
    for name in outermost:
        deeper = _split(containers, name, units) if containers[name] > MAX_STAGE_SHARE * len(units) else set()
        stages |= deeper or {name}
    return stages


def _climb(name: str, chain: list[str], layers: list[str], trace: Trace) -> str:
    best = name
    for candidate in chain[1:]:
        seen = trace.modules.get(candidate)
        alone = sum(is_inside(layer, candidate) for layer in layers) == 1
        if not alone:
            break
        if seen is not None and seen.tensor_to_tensor and seen.calls == trace.layers[name].calls:
            best = candidate
    return best


def _matching(model: nn.Module, patterns: Sequence[str], key: str) -> set[str]:
    names = [name for name, _ in model.named_modules() if name]
    check_patterns(patterns, names, key)
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
