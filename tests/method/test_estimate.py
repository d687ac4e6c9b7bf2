"""What is said of a calibration before it starts comes true."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from repapq_plugin import Progress, RepAPQConfig, quantize_model
from repapq_plugin.core.progress import ESTIMATE, ProgressLines
from repapq_plugin.method.cache import ActivationCache
from repapq_plugin.method.estimate import Estimate
from repapq_plugin.method.schedules import Activation
from tests.support.networks import Chain, batches, settle

Put = ActivationCache[Activation].put


@pytest.mark.parametrize(
    "keys",
    [{"schedule": "stage"}, {"schedule": "unit"}, {"schedule": "network", "steps": 2}, {"solve": True}],
    ids=str,
)
def test_cached_activations_are_known_to_the_byte(
    keys: Mapping[str, object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(1)
    most, seen = [0], list[Progress]()

    def put(self: ActivationCache[Activation], name: Activation, batch: int, tensors: list[Tensor]) -> None:
        Put(self, name, batch, tensors)
        most[0] = max(most[0], self.used)

    monkeypatch.setattr(ActivationCache, "put", put)
    config = RepAPQConfig.from_preset("w8a8", **{"steps": 1, **keys})
    with caplog.at_level(logging.INFO, "repapq_plugin.job"):
        quantize_model(settle(Chain(depth=2)), batches(3), config, progress=seen.append)
    told = [progress for progress in seen if progress.phase == ESTIMATE]
    assert len(told) == 1 and told[0] == seen[0], "before the work starts"
    shown = f"{most[0] / 1000:.3g} KB" if most[0] < 1e6 else f"{most[0] / 1e6:.3g} MB"
    assert told[0].part.startswith(f"activations {shown}, all in memory; memory at the peak about ")
    assert f"Estimate: {told[0].part}" in caplog.text


def test_what_goes_to_disk_is_said() -> None:
    estimate = Estimate(cached=40_000_000_000, budget=4_000_000_000, memory=5_200_000_000, seconds=3725.2)
    assert str(estimate) == (
        "activations 40 GB, 4 GB of them in memory (cache_bytes), 36 GB on disk; "
        "memory at the peak about 5.2 GB; time about 1:02:05"
    )
    lines: list[str] = []
    ProgressLines(lines.append)(estimate.progress)
    assert lines == [f"estimate: {estimate}"]
