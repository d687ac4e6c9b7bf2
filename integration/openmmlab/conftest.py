"""A folder that holds every file the tests make: scenes, checkpoints, work folders; and one that is served."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from integration.openmmlab.scenes import CLASSIFIER, DETECTOR, random_checkpoint


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("openmmlab")


@pytest.fixture(autouse=True)
def _at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def detector_checkpoint(home: Path) -> Path:
    return random_checkpoint(DETECTOR, home / "detector.pth")


@pytest.fixture(scope="session")
def classifier_checkpoint(home: Path) -> Path:
    return random_checkpoint(CLASSIFIER, home / "classifier.pth")


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve a folder, the way a model zoo is."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()
