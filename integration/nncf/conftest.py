"""NNCF without its progress bars, its kernels compiled in their own time, and two small networks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import nncf
import pytest
import torch
from torch import Tensor, nn

from repapq_plugin import RepAPQConfig
from repapq_plugin.hosts.nncf import quantize_with_record
from repapq_plugin.result import Calibrated
from tests.support.networks import Chain, Pyramid, settle


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_patient() -> Iterator[None]:
    nncf.set_log_level(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NNCF_EXTENSION_LOAD_TIMEOUT", "0")
        yield


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


@dataclass(frozen=True)
class Case:
    """A float network, calibration images one by one, others to judge by, and what quantizing it gave."""

    network: nn.Module
    images: list[Tensor]
    unseen: Tensor
    config: RepAPQConfig
    result: Calibrated

    @property
    def dataset(self) -> nncf.Dataset:
        return nncf.Dataset(self.images)


def make_case(network: nn.Module, preset: str, **settings: Any) -> Case:
    images = [torch.randn(1, 3, 16, 16) for _ in range(64)]
    config = RepAPQConfig.from_preset(preset, steps=20, **settings)
    result = quantize_with_record(network, nncf.Dataset(images), repapq=config)
    return Case(network, images, torch.randn(16, 3, 16, 16), config, result)


@pytest.fixture(scope="session")
def chain() -> nn.Module:
    torch.manual_seed(1)
    return settle(Chain(widths=(8, 12)))


@pytest.fixture(scope="session")
def eight(chain: nn.Module) -> Case:
    """The chain at W8A8."""
    torch.manual_seed(2)
    return make_case(chain, "w8a8")


@pytest.fixture(scope="session")
def four(chain: nn.Module) -> Case:
    """The chain at W4A4."""
    torch.manual_seed(3)
    return make_case(chain, "w4a4")


@pytest.fixture(scope="session")
def pyramid() -> Case:
    """A network with a head that is called twice, glue in Python and several outputs, at W6A6."""
    torch.manual_seed(4)
    return make_case(settle(Pyramid()), "w6a6")
