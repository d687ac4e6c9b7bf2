"""Input channels of layers: what they hold over calibration batches, and how large the weights are that read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import TypeGuard, TypeVar, cast

from torch import Tensor, nn

from repapq_plugin.core.hooks import Hooks
from repapq_plugin.core.tensors import first_tensor
from repapq_plugin.reparam.layer_maps import is_plain_conv, is_plain_linear

Layer = nn.Conv2d | nn.Linear
"""A layer whose channels can be changed."""

B = TypeVar("B")
L = TypeVar("L", bound=nn.Module)


def is_plain(layer: nn.Module) -> TypeGuard[Layer]:
    """Whether a layer multiplies its input with its weight, adds its bias and does nothing else, as torch's own do.

    A subclass with a forward of its own may make anything of its weight; its channels stay as they are.
    """
    return is_plain_conv(layer) or is_plain_linear(layer)


def tied_parameters(model: nn.Module) -> set[int]:
    """Return by ``id`` the parameters that more than one module reads, as one object or in one place of memory."""
    held = [p for module in model.modules() for p in module._parameters.values() if p is not None]
    places = Counter((p.data_ptr(), p.device) for p in held if p.numel())
    return {id(p) for p in held if p.numel() and places[p.data_ptr(), p.device] > 1}


def own_parameters(layer: nn.Module, tied: Collection[int]) -> bool:
    """Whether a layer holds its weight as a parameter, and nobody else holds that or its bias.

    Args:
        layer: A convolution or a linear layer.
        tied: What `tied_parameters` returned for the model.
    """
    return "weight" in layer._parameters and not any(id(p) in tied for p in layer._parameters.values())


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
    *,
    alike: bool = False,
) -> None:
    """Run batches and show, call after call, what layers read; calls without images are left out.

    Args:
        layers: Convolutions and linear layers.
        run: Makes a forward pass of the network that they are in.
        batches: What to run.
        see: ``see(layer, values)`` is given ``[in_channels, values of a channel]``.
        alike: Divide each sample by its largest absolute value first, so that all count alike.
    """

    def hook(layer: L, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        x = first_tensor(args, kwargs)
        if x is not None and x.numel():
            # A linear layer's channels lie in the last axis, a convolution's in front of the positions.
            axis = -1 if isinstance(layer, nn.Linear) else 1 - cast(Tensor, layer.weight).dim()
            x = x.detach()
            if alike and x.dim() > 1:
                x = x / x.abs().flatten(1).amax(1).clamp_min(1e-30).reshape(-1, *[1] * (x.dim() - 1))
            see(layer, x.movedim(axis, 0).flatten(1))

    if not layers:
        return
    with Hooks() as hooks:
        for layer in layers:
            hooks.before(layer, hook, with_kwargs=True)
        for batch in batches:
            run(batch)
