"""Input channels of layers: what they hold over calibration batches, and how large the weights are that read them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeVar, cast

from torch import Tensor, nn

from repapq_plugin.core.hooks import Hooks
from repapq_plugin.core.tensors import first_tensor

Layer = nn.Conv2d | nn.Linear
"""A layer whose channels can be changed."""

B = TypeVar("B")
L = TypeVar("L", bound=nn.Module)


def largest_weights(layer: Layer) -> Tensor:
    """Return the largest absolute weight that reads each input channel, float64 ``[in_channels]``.

    Args:
        layer: A convolution (also grouped) or a linear layer.
    """
    weight = layer.weight.detach().abs().double()
    groups = getattr(layer, "groups", 1)
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).amax(dim=(1, 3)).flatten()


def read_channels(
    layers: Collection[L],
    run: Callable[[B], object],
    batches: Sequence[B],
    see: Callable[[L, Tensor], None],
) -> None:
    """Run batches and show, call after call, what layers read; calls without images are left out.

    Args:
        layers: Convolutions and linear layers.
        run: Makes a forward pass of the network that they are in.
        batches: What to run.
        see: ``see(layer, values)`` is given ``[in_channels, values of a channel]``.
    """

    def hook(layer: L, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        x = first_tensor(args, kwargs)
        if x is not None and x.numel():
            # A linear layer's channels lie in the last axis, a convolution's in front of the positions.
            axis = -1 if isinstance(layer, nn.Linear) else 1 - cast(Tensor, layer.weight).dim()
            see(layer, x.detach().movedim(axis, 0).flatten(1))

    if not layers:
        return
    with Hooks() as hooks:
        for layer in layers:
            hooks.before(layer, hook, with_kwargs=True)
        for batch in batches:
            run(batch)
