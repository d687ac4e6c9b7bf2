"""pt2e as a backend of the job: calibrate, convert, and stay simulated with a reason where that fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from integration.torch_ao.shared import CONFIG, Fickle
from repapq_plugin import CalibrationResult
from repapq_plugin.errors import ConfigError
from repapq_plugin.hosts.pt2e.hosted import quantize_network
from tests.support.networks import Chain, batches, settle


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    torch.manual_seed(0)
    return batches(2)


def test_a_network_comes_back_converted_for_any_batch(data: list[Tensor], tmp_path: Path) -> None:
    network = settle(Chain())
    hosted = quantize_network(network, [batch[:1] for batch in data], CONFIG)
    x = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        expected = hosted.result.model(x)
        assert torch.equal(hosted.network(x), expected)
        assert torch.equal(hosted.network(x[:1]), hosted.result.model(x[:1]))
        (saved,) = hosted.save(tmp_path)
        assert torch.equal(CalibrationResult.load(saved, network).model(x), expected)


def test_what_cannot_be_exported_stays_simulated(data: list[Tensor]) -> None:
    torch.manual_seed(0)
    hosted = quantize_network(settle(Fickle()), data, CONFIG)
    assert hosted.network is hosted.result.model
    assert any("runs simulated" in note and "cannot be exported" in note for note in hosted.result.notes)


def test_no_option_is_known(data: list[Tensor]) -> None:
    with pytest.raises(ConfigError, match="options.strict is not a key"):
        quantize_network(Chain(), data, CONFIG, options={"strict": True})
