"""Comparing layer by layer: equal networks are, and what one layer does otherwise is seen there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from integration.libraries.layer_by_layer import Comparison, compare
from repapq_plugin import RepAPQConfig, export_onnx, quantize_model
from repapq_plugin.core.tensors import floating_tensors


class Net(nn.Module):
    """Convolutions, one of them called twice, and linear layers on two and on three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3, padding=1)
        self.tokens, self.fc = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(self.twice(self.stem(x).relu()).relu())
        return self.fc(self.tokens(y.flatten(2).transpose(1, 2)).relu().mean(1))


def compared(folder: Path, change: Callable[[nn.Module], object], bits: int = 8) -> Comparison:
    torch.manual_seed(0)
    data = [torch.rand(4, 3, 16, 16) for _ in range(2)]
    model = quantize_model(Net().eval(), data, RepAPQConfig(steps=0, activation_bits=bits, first_last_bits=None)).model
    path = folder / "network.onnx"
    export_onnx(model, data[0][:1], path, dynamic_batch=False)
    with torch.no_grad():
        change(model)
    return compare(model, data[1][:1], path, floating_tensors)


@pytest.mark.parametrize("bits", [8, 3])
def test_a_file_equals_what_it_was_made_from(bits: int, tmp_path: Path) -> None:
    found = compared(tmp_path, lambda model: None, bits)
    assert (found.calls, found.far) == (5, 0) and max(found.between, found.layers) < 1e-5


@pytest.mark.parametrize("layer", ["stem", "twice", "tokens", "fc"])
def test_another_weight_is_seen(layer: str, tmp_path: Path) -> None:
    found = compared(tmp_path, lambda model: model.get_submodule(layer).weight.mul_(1.1))
    assert found.layers > 1e-2 and found.between < 1e-5 and found.far == 0


@pytest.mark.parametrize("layer", ["stem", "twice", "tokens", "fc"])
def test_another_grid_is_seen(layer: str, tmp_path: Path) -> None:
    found = compared(tmp_path, lambda model: model.get_submodule(layer).input_fake_quant.log_scale.add_(0.01))
    assert found.far > 0


def test_another_function_between_layers_is_seen(tmp_path: Path) -> None:
    def change(model: nn.Module) -> None:
        model.tokens.register_forward_hook(lambda layer, args, output: output * 1.01)

    found = compared(tmp_path, change)
    assert found.between > 1e-3 and found.layers < 1e-5
