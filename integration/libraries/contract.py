"""What holds for a network of any library once it is quantized; each library's tests subclass these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from integration.libraries.layer_by_layer import compare
from integration.libraries.networks import Network, Run, State, decibels, quantized
from repapq_plugin import CalibrationResult, export_onnx
from repapq_plugin.core.tensors import floating_tensors
from repapq_plugin.quantizers.layers import QUANTIZABLE, QuantizedLayer
from tests.support.comparing import equal, equal_numbers

LEAST = 25.0
"""Decibels that every raw output keeps."""


class LibraryContract:
    """What setting ranges has to give; every network of a subclass runs through every test.

    Args:
        networks: By name.
    """

    networks: ClassVar[Mapping[str, Network]]

    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, name: str) -> Run:
        return quantized(cls.networks[name])

    def test_blocks_with_branches_are_merged(self, run: Run) -> None:
        blocks = {name for name, module in run.model.named_modules() if isinstance(module, run.network.blocks)}
        assert {record.name for record in run.result.merges if record.merged} == blocks
        assert not [record for record in run.result.merges if not record.merged]

    def test_every_norm_is_merged_or_folded(self, run: Run) -> None:
        norms = {name for name, module in run.model.named_modules() if run.network.is_norm(module)}
        merged = {name for name in norms if any(name.startswith(f"{r.name}.") for r in run.result.merges)}
        assert norms
        assert {norm for _, norm in run.result.plan.folded} == norms - merged
        assert not [module for module in run.result.model.modules() if run.network.is_norm(module)]

    def test_what_stays_float_is_named_with_its_reason(self, run: Run) -> None:
        reasons, expected = run.result.float_layers, run.network.stays_float
        named = {name: text for name in reasons for pattern, text in expected.items() if fnmatchcase(name, pattern)}
        assert named.keys() == reasons.keys()
        assert all(text in reasons[name] for name, text in named.items())
        assert all(any(fnmatchcase(name, pattern) for name in reasons) for pattern in expected)

    def test_every_other_layer_is_quantized(self, run: Run) -> None:
        layers = {name: m for name, m in run.result.model.named_modules() if isinstance(m, QUANTIZABLE)}
        carrying = {name for name, layer in layers.items() if isinstance(layer, QuantizedLayer)}
        assert carrying == set(run.result.layers)
        assert layers.keys() - carrying == layers.keys() & run.result.float_layers.keys()

    def test_raw_outputs_are_near_those_of_the_float_network(self, run: Run) -> None:
        assert_near(run)

    def test_float_network_is_left_as_it_was(self, run: Run) -> None:
        now, before = State.of(run.model), run.before
        assert equal_numbers(now.numbers, before.numbers)
        assert (now.flags, now.hooks, now.kinds) == (before.flags, before.hooks, before.kinds)
        assert now.training == before.training
        assert equal(run.network.outputs(run.model, run.images), run.wanted)

    def test_saved_and_loaded_is_the_same_network(self, run: Run, tmp_path: Path) -> None:
        assert_loads(run, tmp_path)

    def test_onnx_computes_what_the_simulation_computes(self, run: Run, tmp_path: Path) -> None:
        network, path = run.network, tmp_path / "network.onnx"
        simulation = network.exported(run.result.model)
        torch.manual_seed(0)
        export_onnx(simulation, network.images(1), path, dynamic_batch=False)
        for images in pictures(network.size, count=2):
            found = compare(simulation, images, path, floating_tensors)
            assert found.calls >= len(run.result.layers) and found.far == 0
            assert max(found.between, found.layers) <= 1e-4


class LearningContract:
    """What learning, however short, has to keep.

    Args:
        networks: By name.
    """

    networks: ClassVar[Mapping[str, Network]]

    def test_outputs_stay_near_and_load_again(self, name: str, tmp_path: Path) -> None:
        run = quantized(self.networks[name], steps=2)
        assert run.result.units
        assert_near(run)
        assert_loads(run, tmp_path)


def assert_near(run: Run) -> None:
    got = run.network.outputs(run.result.model, run.images)
    assert min(decibels(wanted, tensor) for wanted, tensor in zip(run.wanted, got, strict=True)) >= LEAST


def assert_loads(run: Run, folder: Path) -> None:
    saved = run.result.save(folder / "result.safetensors")
    loaded = CalibrationResult.load(saved, run.model)
    got, wanted = (run.network.outputs(model, run.images) for model in (loaded.model, run.result.model))
    assert equal(got, wanted)


def pictures(size: tuple[int, int], count: int) -> Iterator[Tensor]:
    """Yield single images: noise, and colours that fade from top to bottom."""
    fading = torch.linspace(0, 1, size[0]).reshape(1, 1, -1, 1)
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        yield torch.rand(1, 3, *size, generator=generator)
        yield (torch.rand(1, 3, 1, 1, generator=generator) * fading).expand(1, 3, *size).contiguous()
