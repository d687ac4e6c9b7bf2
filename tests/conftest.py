"""What every unit test shares: one thread, one seed, our own loggers, examples that are the same in every run."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _loggers_as_python_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toolboxes that other tests of the same process loaded silence loggers that are not theirs."""
    monkeypatch.setattr(logging.root.manager, "disable", logging.NOTSET)
    for name, logger in logging.root.manager.loggerDict.items():
        if name.partition(".")[0] == "repapq_plugin" and isinstance(logger, logging.Logger):
            monkeypatch.setattr(logger, "disabled", False)
            monkeypatch.setattr(logger, "propagate", True)
            logger.setLevel(logging.NOTSET)
