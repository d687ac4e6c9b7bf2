"""What ``--device`` takes, and what ``repapq doctor`` says of accelerators: stand-ins for machines that have some."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from repapq_plugin.cli import main
from repapq_plugin.cli.devices import accelerators, device_named
from repapq_plugin.errors import ConfigError


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(get_device_name=lambda index: f"Card of Make {index}")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)


def test_accelerators_are_found_by_what_they_are_called(two_cards: None) -> None:
    assert accelerators() == {"cuda:0": "Card of Make 0", "cuda:1": "Card of Make 1"}


def test_an_accelerator_that_says_no_name_goes_by_its_kind(two_cards: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda kind: SimpleNamespace())
    assert accelerators()["cuda:1"] == "cuda"


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:1"])
def test_what_is_there_is_taken(name: str, two_cards: None) -> None:
    assert device_named(name) == torch.device(name)


@pytest.mark.parametrize("name", ["cuda:2", "mps", "xpu:0", "gpu", "", "cuda:x", "cpu:7"])
def test_what_is_not_there_is_an_error_that_names_what_is(name: str, two_cards: None) -> None:
    with pytest.raises(ConfigError) as raised:
        device_named(name)
    assert str(raised.value) == (
        f"--device {name!r} is not allowed; torch finds cpu, cuda:0 (Card of Make 0), cuda:1 (Card of Make 1) here."
    )


def test_without_any_there_is_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert accelerators() == {}
    with pytest.raises(ConfigError, match="'cuda' is not allowed; torch finds cpu here"):
        device_named("cuda")


def test_doctor_says_the_accelerators(two_cards: None, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    assert "accelerator: cuda:1, Card of Make 1" in capsys.readouterr().out


def test_doctor_says_nothing_of_accelerators_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    main(["doctor"])
    assert "accelerator" not in capsys.readouterr().out
