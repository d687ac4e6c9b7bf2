"""What every law of a backend needs: a network, data, a job stopped between two phases."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from repapq_plugin.backend import Backend
from repapq_plugin.config import RepAPQConfig
from repapq_plugin.job import Job, State
from repapq_plugin.method.sites import Quantizer
from repapq_plugin.method.starting_ranges import not_quantizing
from repapq_plugin.result import Calibrated
from tests.support.comparing import flags
from tests.support.networks import Chain, Pyramid, batches, settle
from tests.support.placed import on_backend_after

ROUNDING = 2e-5
"""What two orders of the same float32 sums may differ by, relative to the largest output."""


def codes_of(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Integers that a quantizer makes of a tensor, told from what it returns."""
    scale, zero_point = quantizer.qparams()
    shape = [1] * x.dim()
    if quantizer.ch_axis is not None:
        shape[quantizer.ch_axis] = -1
    with torch.no_grad():
        return (quantizer.module(x) / scale.reshape(shape)).round() + zero_point.reshape(shape)


@contextmanager
def resting(quantizers: Sequence[Quantizer]) -> Iterator[None]:
    with torch.no_grad(), not_quantizing(quantizers):
        yield


class ContractBase(ABC):
    """What a host says once, and what each law is given: a chain of blocks, and a pyramid with a head called twice."""

    preset = "w4a4"
    learning_steps = 40

    @abstractmethod
    def backend(self) -> Backend[object]:
        """Return a new backend."""

    @abstractmethod
    def record(self, result: object) -> Calibrated:
        """Return the simulated network and the record of what the backend delivers."""

    def delivered(self, model: nn.Module, data: Sequence[Tensor], **keys: object) -> nn.Module:
        """Run a whole job and return the simulated network of what it delivers."""
        return self.record(Job(self.backend(), self.config(**keys)).run(model, data)).model

    def delivered_flags(self, model: nn.Module, delivered: nn.Module) -> dict[str, bool]:
        """Return which parameters of what is delivered should require gradients: none, unless a host says other."""
        return dict.fromkeys(flags(delivered), False)

    @pytest.fixture(autouse=True)
    def _one_seed(self) -> None:
        torch.manual_seed(0)

    @pytest.fixture(params=[Chain, Pyramid], ids=["chain", "pyramid"])
    def model(self, request: pytest.FixtureRequest) -> nn.Module:
        """The user's float network."""
        torch.manual_seed(1)
        return settle(request.param())

    @pytest.fixture
    def data(self) -> list[Tensor]:
        """Calibration batches."""
        torch.manual_seed(2)
        return batches(4)

    @pytest.fixture
    def unseen(self) -> Tensor:
        """Images of which no calibration knows."""
        torch.manual_seed(3)
        return torch.randn(32, 3, 16, 16)

    def config(self, **keys: object) -> RepAPQConfig:
        return RepAPQConfig.from_preset(self.preset, **{"steps": 4, **keys})

    def after(
        self, phase: str, model: nn.Module, data: Sequence[Tensor], **keys: object
    ) -> tuple[Backend[object], State]:
        job, state = on_backend_after(self.backend(), phase, model, data, self.config(**keys))
        return job.backend, state
