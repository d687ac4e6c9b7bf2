"""Every trait in every host: what it makes computes what was calibrated, or an error of ours says why it cannot.

Each pair is tried with 8 or with 4 bits, each trait and each host with both; the whole product is a command
(``python -m integration.traits.matrix``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import nncf
import pytest

from integration.traits.cells import HOSTS, quantize_cell
from integration.traits.networks import NETWORKS

LEARNED = ("plain", "SAME subclass", "standardized weight", "tied weights", "in-place input", "float16", "function")
"""Traits that are learned with as well."""

REFUSED = {
    ("dataclass output", "NNCF"): "OpenVINO cannot convert",
    ("dataclass output", "torch.ao eager"): "'dequant' cannot run on integers",
    ("dataclass output", "pt2e"): "ToDataclass cannot be exported",
    ("in-place input", "NNCF"): "",  # the form that is loaded
    ("in-place input", "torch.ao eager"): "'module' cannot run on integers",
    ("encoder", "own"): "cannot be traced to ONNX",
    ("encoder", "torch.ao eager"): "self_attn' cannot run on integers",
    ("function", "torch.ao eager"): "'module' cannot run on integers",
    ("scripted part", "own"): "cannot be traced to ONNX",
    ("scripted part", "NNCF"): "NNCF cannot trace 'part', which is a script",
    ("scripted part", "torch.ao eager"): "'module' cannot run on integers",
    ("scripted part", "pt2e"): "Inner cannot be exported",
    ("nested output", "NNCF"): "OpenVINO cannot convert",
    ("nested output", "torch.ao eager"): "'dequant' cannot run on integers",
    ("group norm", "torch.ao eager"): "'module.body.4' cannot run on integers",
    ("double", "own"): "is in double precision",
    ("double", "NNCF"): "OpenVINO cannot convert",
    ("double", "torch.ao FX"): "is in double precision",
    ("double", "torch.ao eager"): "is in double precision",
    ("double", "pt2e"): "is in double precision",
    ("two products", "torch.ao eager"): "'module.body.3' cannot run on integers",
    **{(trait, host): "is sharded over processes" for trait in ("FSDP", "fully_shard part") for host in HOSTS},
}
"""What is refused, with a part of the message; everything else must be done."""


@pytest.fixture(scope="module", autouse=True)
def _quiet_and_patient() -> Iterator[None]:
    nncf.set_log_level(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NNCF_EXTENSION_LOAD_TIMEOUT", "0")
        yield


def check(trait: str, host: str, preset: str, steps: int) -> None:
    cell = quantize_cell(trait, host, preset, steps)
    assert not cell.fails, f"{trait} in {host}, {preset}, {steps} steps: {cell}"
    if (trait, host) in REFUSED:
        assert not cell.refused or REFUSED[trait, host] in cell.refused
    else:
        assert not cell.refused
    assert cell.figures or cell.refused


PAIRS = [
    (trait, host, ("w8a8", "w4a4")[(row + column) % 2])
    for row, trait in enumerate(NETWORKS)
    for column, host in enumerate(HOSTS)
]


@pytest.mark.parametrize(("trait", "host", "preset"), PAIRS)
def test_what_a_host_makes_computes_what_was_calibrated(trait: str, host: str, preset: str) -> None:
    check(trait, host, preset, 0)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("trait", LEARNED)
def test_the_same_after_learning(trait: str, host: str) -> None:
    check(trait, host, "w4a4", 20)
