"""A layer that is called more than once in a pass: the loud call's range is not cut for the sake of a quiet one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.quantizers.layers import QuantizedLayer


class Pyramid(nn.Module):
    """One head on a loud level, and on two that are a hundredth and a thousandth as large."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.tower, self.head = nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x).relu()
        levels = [x, 0.01 * nn.functional.avg_pool2d(x, 2), 0.001 * nn.functional.avg_pool2d(x, 4)]
        return tuple(self.head(self.tower(level).relu()) for level in levels)


def test_all_calls_of_a_pass_are_judged_together() -> None:
    torch.manual_seed(0)
    model = Pyramid().eval()
    for layer in (model.tower, model.head):
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
    batches = [torch.randn(4, 3, 32, 32) for _ in range(4)]
    settings = RepAPQConfig(steps=0, first_last_bits=None)
    decibels = {}
    for observer in ("auto", "mae"):
        result = quantize_model(model, batches, settings.replace(activation_observer=observer))
        tower = result.model.get_submodule("tower")
        assert isinstance(tower, QuantizedLayer)
        with torch.no_grad():
            wanted, got = model(batches[0])[0], result.model(batches[0])[0]
        decibels[observer] = float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum()))
    assert decibels["auto"] > 33 and decibels["mae"] < 25, decibels
