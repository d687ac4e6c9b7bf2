"""A folder that holds every file the tests make: scenes, checkpoints, work folders."""

from __future__ import annotations

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
