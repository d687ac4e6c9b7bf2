"""The weights that a training with MimicNorm starts from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from repapq_plugin.core.hooks import Hooks
from repapq_plugin.core.running import inference
from repapq_plugin.mimicnorm.weight_mean import Layer, WeightMean, fan_in, takes_weight_mean

B = TypeVar("B")

RELU_GAIN = 2.0
MEAN_FREE_GAIN = 2 * math.pi / (math.pi - 1)
"""Variance of a weight times its fan-in that keeps activations as large as they were. A mean-free filter only sees the
variance of a rectified normal variable, (1 - 1/pi) / 2 of what it was, not its square (our derivation, 2.93; the
authors take 2.8 to 2.88)."""


@torch.no_grad()
def initialise_weights(
    model: nn.Module,
    layers: Sequence[Layer],
    forward: Callable[[nn.Module, B], object],
    example: B,
) -> None:
    """Draw He-normal weights, project them, and scale each layer so that its output varies by one.

    The scaling is our choice: gains are derived for inputs behind a ReLU, and not every layer has one in front
    (a depthwise layer's reader in ShuffleNet), which otherwise adds up over the depth.

    Args:
        model: The converted network; changed.
        layers: Those to initialise.
        forward: Runs the network on ``example``.
        example: A batch.
    """
    for layer in dict.fromkeys(layers):
        gain = MEAN_FREE_GAIN if takes_weight_mean(layer) else RELU_GAIN
        nn.init.normal_(layer.weight, std=math.sqrt(gain / fan_in(layer)))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    WeightMean(model).apply()
    calls: Counter[nn.Module] = Counter()

    def scale(layer: Layer, _: object, output: Tensor) -> Tensor | None:
        calls[layer] += 1
        spread = output.float().std()
        if calls[layer] > 1 or not bool(spread.isfinite()) or float(spread) == 0:
            return None
        layer.weight /= spread
        return output / spread

    with Hooks() as hooks, inference(model):
        for layer in dict.fromkeys(layers):
            hooks.after(layer, scale)
        forward(model, example)
