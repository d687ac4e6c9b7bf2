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
from repapq_plugin.mimicnorm.recipe import Recipe, RecipeLike, find_recipe
from repapq_plugin.mimicnorm.weight_mean import Layer, WeightMean, fan_in, takes_weight_mean

B = TypeVar("B")

RELU_GAIN = 2.0
MIN_CHANNELS = 4
"""What a filter of fewer input channels counts as, if the authors' weights are drawn (their code for ShuffleNetV2)."""
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
    recipe: RecipeLike = "default",
) -> None:
    """Draw He-normal weights, project them, and scale each layer so that its output varies by one.

    The scaling is our choice: gains are derived for inputs behind a ReLU, and not every layer has one in front
    (a depthwise layer's reader in ShuffleNet), which otherwise adds up over the depth. The authors do not scale:
    their gain is 2, and convolutions count four channels at least as their fan-in (``start="he"``).

    Args:
        model: The converted network; changed.
        layers: Those to initialise.
        forward: Runs the network on ``example``.
        example: A batch.
        recipe: `Recipe.start` and the layers of the weight mean.

    Raises:
        ConfigError: There is no such recipe.
    """
    chosen = find_recipe(recipe)
    for layer in dict.fromkeys(layers):
        nn.init.normal_(layer.weight, std=math.sqrt(_variance(layer, chosen)))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    WeightMean(model, chosen).apply()
    if chosen.start == "unit":
        _scale_to_one(model, layers, forward, example)


def _variance(layer: Layer, recipe: Recipe) -> float:
    """Return the variance that a layer's weights are drawn with."""
    if recipe.start == "unit":
        return (MEAN_FREE_GAIN if takes_weight_mean(layer, recipe) else RELU_GAIN) / fan_in(layer)
    kernel = math.prod(layer.weight.shape[2:])
    channels = layer.weight.shape[1] if isinstance(layer, nn.Linear) else max(MIN_CHANNELS, layer.weight.shape[1])
    return RELU_GAIN / (channels * kernel)


def _scale_to_one(
    model: nn.Module, layers: Sequence[Layer], forward: Callable[[nn.Module, B], object], example: B
) -> None:
    """Divide each layer's weights, in the order in which they run, by the standard deviation of its first output."""
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
