"""One thread for each process of the suite; what mmengine keeps for a whole process is taken away between tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin the longest files before the others of this folder: at the end one process would wait for the other."""
    here = Path(__file__).parent
    long = (here / "traits", here / "targets")
    items.sort(key=lambda item: 0 if here not in item.path.parents else 1 if item.path.parent in long else 2)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests run in two processes side by side; threads of their own would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _nothing_left_of_mmengine() -> Iterator[None]:
    """Loggers write to the output of an earlier test, visualizers into its folder; a default scope hides names."""
    yield
    if "mmengine" not in sys.modules:
        return
    from mmengine.logging import MMLogger
    from mmengine.registry import DefaultScope

    for logger in MMLogger._instance_dict.values():
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
    MMLogger._instance_dict.clear()
    DefaultScope._instance_dict.clear()
    if "mmengine.visualization" in sys.modules:
        from mmengine.visualization import Visualizer

        for kind in (Visualizer, *_kinds_of(Visualizer)):
            kind._instance_dict.clear()


def _kinds_of(kind: type) -> Iterator[type]:
    for inner in kind.__subclasses__():
        yield inner
        yield from _kinds_of(inner)
