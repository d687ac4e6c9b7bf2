"""Collected only where the dependency group ``libraries`` is installed; nothing here reaches for the network."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec

import pytest

NEEDED = ("ultralytics", "transformers", "torchvision")

collect_ignore_glob = [] if all(find_spec(name) for name in NEEDED) else ["test_*.py"]

# Read when the libraries are imported: no calls home, and no settings in the user's own folder.
os.environ["YOLO_OFFLINE"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="libraries_")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test of a contract for every network of its class, all tests of one network after each other."""
    if "name" in metafunc.fixturenames and metafunc.cls is not None:
        metafunc.parametrize("name", metafunc.cls.networks, scope="class")
