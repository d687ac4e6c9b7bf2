"""Two works are told apart by whatever decides about their result, and a message says what it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.fingerprints import Fingerprint, differences, digest, fingerprint

CONFIG = RepAPQConfig()


@dataclass
class Sample:
    image: Tensor
    label: int


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def data() -> list[Tensor]:
    return [torch.full((1, 3, 4, 4), float(index)) for index in range(5)]


def printed(
    model: nn.Module | None = None, batches: list[Tensor] | None = None, config: RepAPQConfig = CONFIG, **told: str
) -> Fingerprint:
    return fingerprint(model or network(), batches or data(), config, told, ("numpy",))


def changed(change: Callable[[nn.Module], object]) -> nn.Module:
    model = network()
    with torch.no_grad():
        change(model)
    return model


def test_the_same_work_has_the_same_fingerprint_whatever_does_not_count() -> None:
    other = printed(network().train(), data(), CONFIG.replace(cache_bytes=7))
    assert differences(printed(), other) == []


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: printed(config=CONFIG.replace(steps=7)), r"config.steps was \d+ and is 7"),
        (lambda: printed(config=CONFIG.replace(layer_bits={"a": (2, 3)})), r"config.layer_bits was {} and is .*2, 3.*"),
        (lambda: printed(changed(lambda m: m[0].bias.add_(1e-7))), "the model differs in 0.bias"),
        (lambda: printed(changed(lambda m: m[1].running_var.mul_(2))), "the model differs in 1.running_var"),
        (lambda: printed(nn.Sequential(*list(network())[:2], nn.ReLU6())), "the model differs in its modules"),
        (lambda: printed(nn.Sequential(*[nn.Conv2d(3, 4, 3) for _ in range(3)])), "the model differs in .* more"),
        (lambda: printed(batches=data()[:4]), "there were 5 calibration batches and are 4"),
        (lambda: printed(batches=data()[::-1]), "the calibration batches come in another order"),
        (lambda: printed(batches=[*data()[:4], data()[4] + 1]), "the calibration data differs in batch 5 of 5"),
        (lambda: printed(preset="mixed"), "preset was not said and is mixed"),
        (lambda: {**printed(), "version": {"torch": "0.1"}}, "version torch was .* and is 0.1"),
        (lambda: {**printed(), "machine": {"device": "cpu", "threads": "77"}}, "threads was 1 and is 77"),
    ],
)
def test_what_counts_is_told_apart_and_named(other: Callable[[], Fingerprint], message: str) -> None:
    found = differences(printed(), other())
    assert any(re.fullmatch(message, text) for text in found), found


def test_a_fingerprint_of_nothing_differs_in_everything() -> None:
    assert len(differences({}, printed())) > 5
    assert differences({"config": 3, "model": None}, printed()) == differences({}, printed())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(4), torch.zeros(2, 2)),
        (torch.zeros(4), torch.zeros(4, dtype=torch.float64)),
        (torch.zeros(4), -torch.zeros(4)),
        (torch.tensor(1), torch.tensor(2)),
        (torch.ones(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)),
        (torch.tensor([True]), torch.tensor([False])),
        (np.zeros(3), np.ones(3)),
        (np.array(1.0), np.array(2.0)),
        ([torch.ones(2), torch.zeros(2)], [torch.zeros(2), torch.ones(2)]),
        ([[1], [2]], [[1, 2]]),
        ({"a": 1}, {"b": 1}),
        (Sample(torch.ones(2), 1), Sample(torch.ones(2), 2)),
        ("1", 1),
        (None, False),
    ],
)
def test_values_that_differ_have_different_digests(one: object, other: object) -> None:
    assert digest(one) != digest(other)
    assert digest(one) == digest(one)


def test_views_and_what_has_no_bytes_have_a_digest_too() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert digest(x.t()) == digest(x.t().contiguous())
    assert digest(torch.empty(3, device="meta")) == digest(torch.empty(3, device="meta"))
    assert digest(torch.zeros(0, 3)) != digest(torch.zeros(3, 0))
    assert digest(torch.eye(3).to_sparse()) and digest(object()) == digest(object())
    assert digest(torch.tensor([1 + 2j]).conj()) == digest(torch.tensor([1 - 2j]))
