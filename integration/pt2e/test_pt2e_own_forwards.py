"""Layers whose forward pads, scales or is called otherwise, in exported graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from repapq_plugin import CalibrationResult, RepAPQConfig, export_onnx, quantize_model
from repapq_plugin.errors import HostError
from repapq_plugin.hosts import pt2e
from tests.support.networks import settle
from tests.support.own_layers import Padded, Scaled, Standardized

Make = Callable[..., nn.Module]


class Ones(nn.Conv2d):
    """Pads with ones."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(functional.pad(x, (1, 1, 1, 1), value=1.0), self.weight, self.bias)


class Beside(nn.Module):
    """Two layers of different forwards read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.other = nn.Conv2d(3, 8, 3, 1, 1), Padded(8, 4, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.one(x) + self.other(x)


def row(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), *middle, nn.ReLU(), nn.Conv2d(8, 4, 1))


def lines() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.ReLU(), nn.Conv1d(8, 4, 4, padding="same", dilation=2))


def volume() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv3d(6, 4, (1, 2, 2), 2)
    )


NETWORKS: dict[str, Make] = {
    "padded": lambda: row(Padded(8, 8, 3, 2)),
    "standardized": lambda: row(Standardized(8, 8, 3)),
    "scaled": lambda: row(Scaled(8, 8, 3)),
    "reflect": lambda: row(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")),
    "circular": lambda: row(nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")),
    "even": lambda: row(nn.Conv2d(8, 8, 4, padding="same")),
    "beside": Beside,
    "lines": lines,
    "volume": volume,
}


def calibrated(model: nn.Module, preset: str) -> CalibrationResult:
    return quantize_model(settle(model, 12), [torch.randn(4, 3, 12, 12)], RepAPQConfig.from_preset(preset, steps=0))


@pytest.mark.parametrize("preset", ["w8a8", "w4a4"])
@pytest.mark.parametrize("name", NETWORKS)
def test_converted_graphs_compute_what_was_calibrated(name: str, preset: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = calibrated(NETWORKS[name](), preset)
    # Images with no activation within 1e-5 steps of a boundary between two codes: a runtime may take the other one.
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    prepared = pt2e.prepare_learned(result, (x,))
    with torch.no_grad():
        wanted = result.model(x)
        assert torch.equal(prepared(x), wanted)
        torch.testing.assert_close(convert_pt2e(prepared)(x), wanted, rtol=1e-5, atol=1e-5)
        network = pt2e.quantized_network(pt2e.prepare_learned(result, (x,)))
        torch.testing.assert_close(network(x), wanted, rtol=1e-5, atol=1e-5)
    written = export_onnx(network, x, tmp_path / "graph.onnx", dynamic_batch=False)
    assert written.integer_layers == len(result.layers)
    assert written.max_rel_difference is not None and written.max_rel_difference < 1e-4


def test_what_is_added_beside_the_grid_is_kept_and_not_exported_otherwise() -> None:
    torch.manual_seed(0)
    result = calibrated(row(Ones(8, 8, 3)), "w4a4")
    x = torch.randn(2, 3, 12, 12)
    prepared = pt2e.prepare_learned(result, (x,))
    with torch.no_grad():
        assert torch.equal(prepared(x), result.model(x))
    with pytest.raises(HostError, match="'2' pads with 1.0"):
        pt2e.quantized_network(prepared)
