"""torch.ao as a backend of the job: calibrate, convert, and stay simulated with a reason where that fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn import quantized as nnq

from integration.torch_ao.shared import CONFIG, Fickle
from repapq_plugin import CalibrationResult, quantize_model
from repapq_plugin.errors import ConfigError, ExportError
from repapq_plugin.hosts.torch_ao.backend import TorchAOBackend
from repapq_plugin.hosts.torch_ao.hosted import quantize_network
from repapq_plugin.job import Job, Progress
from tests.support.networks import Chain, batches, settle


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    torch.manual_seed(0)
    return batches(2)


def test_a_network_comes_back_in_integers(data: list[Tensor], tmp_path: Path) -> None:
    network = settle(Chain())
    before = torch.backends.quantized.engine
    seen: list[Progress] = []
    hosted = quantize_network(network, data, CONFIG, seen.append)
    with torch.no_grad():
        expected = hosted.result.model(data[0])
        assert (hosted.network(data[0]) - expected).abs().max() < 0.05 * expected.abs().max()
    assert sum(isinstance(module, nnq.Conv2d | nnq.Linear) for module in hosted.network.modules()) == 8
    assert torch.backends.quantized.engine == before and seen
    (saved,) = hosted.save(tmp_path)
    with torch.no_grad():
        assert torch.equal(CalibrationResult.load(saved, network).model(data[0]), expected)
    assert hosted.export("onnx", data[0], tmp_path / "network").path == tmp_path / "network.onnx"
    with pytest.raises(ExportError, match="kind='tflite'"):
        hosted.export("tflite", data[0], tmp_path / "network")


def test_what_cannot_be_traced_stays_simulated(data: list[Tensor]) -> None:
    torch.manual_seed(0)
    hosted = quantize_network(settle(Fickle()), data, CONFIG)
    assert hosted.network is hosted.result.model
    assert any("runs simulated" in note and "cannot be traced" in note for note in hosted.result.notes)


def test_options_are_checked(data: list[Tensor]) -> None:
    for options, words in (({"engine": "x86"}, "options.engine is not a key"), ({"backend": "tpu"}, "backend='tpu'")):
        with pytest.raises(ConfigError, match=words):
            quantize_network(Chain(), data, CONFIG, options=options)


@pytest.mark.parametrize("options", [{"engine": "x86"}, {"backend": "tpu"}, {"backend": 3}])
def test_what_is_refused_is_refused_before_any_work(options: dict[str, object], data: list[Tensor]) -> None:
    ran: list[nn.Module] = []

    def forward(model: nn.Module, batch: object) -> object:
        ran.append(model)
        return model(batch)

    with pytest.raises(ConfigError):
        Job(TorchAOBackend(options), CONFIG, forward).run(Chain(), data)
    assert not ran


def test_the_job_calibrates_as_quantize_model_does(data: list[Tensor]) -> None:
    torch.manual_seed(0)
    network, config = settle(Chain()), CONFIG.replace(steps=2)
    hosted = Job(TorchAOBackend(), config).run(network, data)
    own = quantize_model(network, data, config)
    with torch.no_grad():
        assert torch.equal(hosted.result.model(data[0]), own.model(data[0]))
    assert hosted.result.layers == own.layers and hosted.result.notes == own.notes
