"""What gets a name in mmengine's root registries, and its configs a scope."""

from __future__ import annotations

from mmengine.registry import HOOKS, LOOPS, MODELS, RUNNERS, Registry

from repapq_plugin.hosts.openmmlab.hooks import QPRFusionHook
from repapq_plugin.hosts.openmmlab.loops import RepAPQTestLoop
from repapq_plugin.hosts.openmmlab.mimicnorm import MimicNormHook
from repapq_plugin.hosts.openmmlab.runner import RepAPQRunner
from repapq_plugin.hosts.openmmlab.scopes import register_scopes
from repapq_plugin.mimicnorm import MimicNorm2d
from repapq_plugin.observers import OBSERVERS
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize, PerChannelLearnableFakeQuantize


def register() -> None:
    """Put hook, loop, runner, observers and fake quantizers into the root registries; again is harmless.

    Observers and fake quantizers stand in ``MODELS`` under their class names.
    """
    entries: list[tuple[Registry, type]] = [
        (HOOKS, QPRFusionHook),
        (HOOKS, MimicNormHook),
        (LOOPS, RepAPQTestLoop),
        (RUNNERS, RepAPQRunner),
        (MODELS, LearnableFakeQuantize),
        (MODELS, PerChannelLearnableFakeQuantize),
        *((MODELS, observer) for observer in OBSERVERS.values()),
    ]
    MODELS.register_module(name="MimicNorm", module=MimicNorm2d, force=True)
    for registry, cls in entries:
        registry.register_module(module=cls, force=True)
    register_scopes()
