"""What mmengine keeps for a whole process is taken away between tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope


@pytest.fixture(autouse=True)
def _nothing_left_of_mmengine() -> Iterator[None]:
    """Loggers write to the output that a test had captured; a default scope hides other toolboxes' names."""
    yield
    for logger in MMLogger._instance_dict.values():
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
    MMLogger._instance_dict.clear()
    DefaultScope._instance_dict.clear()
