"""A cache of a tenth of what is needed keeps memory within its budget, and changes no bit of the result."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.method.cache import ActivationCache
from repapq_plugin.method.schedules import Activation
from tests.support.killing import same
from tests.support.ranked import values


def status(key: str) -> int:
    """Return a size of this process as Linux tells it, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def network() -> nn.Module:
    """Large activations, and little to compute."""
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()) for _ in range(4)))


def calibrate(rank: int, budget: int) -> tuple[int, int, dict[str, Tensor]]:
    """Return how far memory grew at the most, what the cache held in it at the most, and the tensors, all in bytes."""
    held, put = [0], ActivationCache[Activation].put

    def noted(self: ActivationCache[Activation], name: Activation, batch: int, tensors: list[Tensor]) -> None:
        put(self, name, batch, tensors)
        held[0] = max(held[0], self.used)

    config = RepAPQConfig(steps=2, activation_observer="min_max", affine=False, equalize=False)
    torch.manual_seed(2)
    data = [torch.rand(4, 4, 128, 128) for _ in range(16)]
    quantize_model(network(), data[:2], config.replace(cache_bytes=0))  # libraries load what they need
    ActivationCache.put = noted  # type: ignore[method-assign, assignment]
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what memory is now
    before = status("VmHWM")
    result = quantize_model(network(), data, config.replace(cache_bytes=budget))
    return status("VmHWM") - before, held[0], dict(result.model.state_dict())


def test_memory_stays_within_a_budget_of_a_tenth_of_the_need() -> None:
    unbounded, need, wanted = values(1, calibrate, 2**40)[0]
    assert unbounded >= 0.8 * need > 60e6, "all that is cached is in memory, and the measure sees it"
    nothing, _, _ = values(1, calibrate, 0)[0]
    grown, held, found = values(1, calibrate, need // 10)[0]
    assert 0.9 * need // 10 <= held <= need // 10
    assert grown <= nothing + 1.15 * (need // 10), (grown, nothing, need)
    assert nothing <= 0.25 * need, "the model and one step"
    assert same(found, wanted)
