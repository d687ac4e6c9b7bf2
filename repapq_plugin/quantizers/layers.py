"""Layers that are quantized: each stays the user's own module and runs its own ``forward``.

`quantize_layer` lets a layer play the role of a `QuantizedLayer` (see `repapq_plugin.core.modules.become`): its class,
attributes, hooks, names and state keep theirs. Its first tensor is rounded before its own forward runs, and its weight
is the rounded one for the time of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from repapq_plugin.core.modules import become, resign
from repapq_plugin.core.tensors import change_first_tensor
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize

QUANTIZABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
"""Layers that are quantized: those an integer runtime has kernels for."""


def output_channels_axis(layer: nn.Module) -> int:
    """Return the axis of a weight along which output channels lie (1 for transposed convolutions)."""
    return 1 if isinstance(layer, nn.ConvTranspose2d) else 0


def output_channels(layer: nn.Module) -> int:
    """Return the number of output channels (output features of a linear layer)."""
    return cast(int, layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def weight_of(layer: nn.Module) -> nn.Parameter:
    """Return the weight of a layer."""
    return cast(nn.Parameter, layer.weight)


def bias_of(layer: nn.Module) -> nn.Parameter | None:
    """Return the bias of a layer, float ``(channels,)``, if it has one."""
    return cast("nn.Parameter | None", layer.bias)


class ChannelAffine(nn.Module):
    """``y = gamma * x + beta`` per output channel, QPR's layer behind the merged convolution.

    Starts as the identity. ``gamma`` and ``beta`` are float ``(channels,)``; ``x`` is ``(..., channels, *positions)``.

    Args:
        channels: Number of channels.
        positions: Number of axes behind that of the channels: 2 for images, 0 behind a linear layer.
        like: Says dtype and device.
        inside: Whether it acts on the real weight and the bias, before they are rounded: for a grid that cannot take
            it in afterwards.
    """

    def __init__(self, channels: int, positions: int, like: Tensor, *, inside: bool = False) -> None:
        super().__init__()
        self.positions, self.inside = positions, inside
        self.gamma = nn.Parameter(torch.ones(channels, dtype=like.dtype, device=like.device))
        self.beta = nn.Parameter(torch.zeros(channels, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift each channel of ``x``."""
        shape = (-1, *[1] * self.positions)
        return self.gamma.reshape(shape) * x + self.beta.reshape(shape)

    def scaled(self, weight: Tensor, axis: int) -> Tensor:
        """Return a weight whose output channels, along ``axis``, are scaled by ``gamma``."""
        shape = [1] * weight.dim()
        shape[axis] = -1
        return self.gamma.reshape(shape) * weight

    def shifted(self, bias: Tensor | None) -> Tensor:
        """Return ``gamma * bias + beta``, float ``(channels,)``."""
        return self.beta if bias is None else self.gamma * bias + self.beta


def affine_positions(layer: nn.Module) -> int:
    """Return how many axes follow that of the channels in a layer's output."""
    return 0 if isinstance(layer, nn.Linear) else weight_of(layer).dim() - 2


PRODUCTS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear")
"""Names of the functions that multiply an input with a weight: ``f(input, weight, bias, ...)``."""


class ReplacedWeight(TorchFunctionMode):
    """Inside, every product is made with this weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in PRODUCTS:
            if len(args) > 1:
                args = (args[0], self.weight, *args[2:])
            else:
                kwargs = {**(kwargs or {}), "weight": self.weight}
        return func(*args, **(kwargs or {}))


class RunsOwnForward(nn.Module):
    """A role whose forward runs the layer's own with another input and another weight."""

    is_baked: bool = False
    """Whether ``weight`` is what is multiplied, whatever the layer's own forward would make of it (`BakedLayer`)."""

    def float_forward(self, *args: object, **kwargs: object) -> Tensor:
        """Run the layer's own forward, with its float weight."""
        forward = cast(Callable[..., Tensor], super().forward)
        if not self.is_baked:
            return forward(*args, **kwargs)
        with ReplacedWeight(cast(Tensor, self.weight)):
            return forward(*args, **kwargs)

    @contextmanager
    def multiplying(self, weight: Tensor, bias: Tensor | None = None) -> Iterator[None]:
        """Let the layer's own forward read ``weight`` as its ``weight`` for a while, and ``bias`` if there is one."""
        # Python looks here before it asks the module for its parameters, which stay as they are.
        vars(self)["weight"] = weight
        if bias is not None:
            vars(self)["bias"] = bias
        try:
            yield
        finally:
            vars(self).pop("weight", None)
            if bias is not None:
                vars(self).pop("bias", None)


R = TypeVar("R", bound=RunsOwnForward)


class BakedLayer(RunsOwnForward):
    """The role of a layer whose own forward makes what it multiplies from its weight: that product is its weight now.

    Whatever else the forward does (padding of its own) goes on being done; the tensor that it hands to the convolution
    as a weight is replaced by ``weight``. `own_forward.bake_weights` finds such layers.
    """

    is_baked = True

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Run the layer's own forward, its products made with ``weight``."""
        return self.float_forward(*args, **kwargs)


def take_role(layer: nn.Module, role: type[R]) -> R:
    """Let a layer play a role in which it runs its own forward; a baked one goes on multiplying its ``weight``."""
    baked = isinstance(layer, RunsOwnForward) and layer.is_baked
    taken = become(layer, role)
    taken.is_baked = baked
    return taken


class QuantizedLayer(RunsOwnForward):
    """The role of a quantized layer: ``affine(forward(input_fake_quant(x)))``, with ``weight_fake_quant(weight)``.

    The affine layer acts on weight and bias; one that is `ChannelAffine.inside` does before the weight is rounded.
    ``input_fake_quant`` may be shared with other layers that read the same tensor, ``weight_fake_quant`` with layers of
    the same weight. After the fold ``affine`` is ``None`` and the weights lie on their grid. Made by `quantize_layer`.
    """

    weight_fake_quant: LearnableFakeQuantize
    input_fake_quant: LearnableFakeQuantize
    affine: ChannelAffine | None

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Run the layer on the quantized input with quantized weights."""
        args, kwargs = change_first_tensor(args, kwargs, self.input_fake_quant)
        affine = self.affine
        weight, bias = cast(Tensor, weight_of(self)), None
        if affine is not None and affine.inside:
            weight = affine.scaled(weight, output_channels_axis(self))
        weight = self.weight_fake_quant(weight)
        if affine is not None:
            # On the weight, not on the output: the same function, and a weight is small.
            weight = weight if affine.inside else affine.scaled(weight, output_channels_axis(self))
            bias = affine.shifted(bias_of(self))
        with self.multiplying(weight, bias):
            return self.float_forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer":  # where the layer was before it stayed in its own place
                return self
            raise


OUTPUT = "output_fake_quant"
"""Child of a layer or another module whose output is rounded."""


class RoundedLayer(QuantizedLayer):
    """The role of a `QuantizedLayer` whose output is rounded too. Made by `outputs.insert_outputs`."""

    output_fake_quant: LearnableFakeQuantize

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Run the layer and round what it gives."""
        return cast(Tensor, self.output_fake_quant(super().forward(*args, **kwargs)))


ADDED = ("weight_fake_quant", "input_fake_quant", "affine")
"""Children that `quantize_layer` gives a layer."""


def quantize_layer(
    layer: nn.Module, weight_fake_quant: LearnableFakeQuantize, input_fake_quant: LearnableFakeQuantize
) -> QuantizedLayer:
    """Let a convolution or linear layer be a `QuantizedLayer`, in place.

    Args:
        layer: The float layer (its weight and bias go on learning).
        weight_fake_quant: Quantizer of the weight; per channel along the output axis, or per tensor.
        input_fake_quant: Per-tensor quantizer of the input.

    Returns:
        ``layer`` itself.
    """
    quantized = take_role(layer, QuantizedLayer)
    quantized.weight_fake_quant = weight_fake_quant
    quantized.input_fake_quant = input_fake_quant
    quantized.register_module("affine", None)
    return quantized


def float_layer(layer: QuantizedLayer) -> nn.Module:
    """Take the quantizers off a layer again, in place; its weight stays what it is, and a baked one stays baked."""
    for name in ADDED:
        del layer._modules[name]
    layer._modules.pop(OUTPUT, None)
    return become(layer, BakedLayer) if vars(layer).pop("is_baked") else resign(layer)


def apply_layer(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Run a plain ``layer`` on ``x`` with another weight of the same shape; subclasses' own forwards are not run."""
    bias = cast("Tensor | None", layer.bias)
    if isinstance(layer, nn.Linear):
        return functional.linear(x, weight, bias)
    if isinstance(layer, nn.ConvTranspose2d):
        return functional.conv_transpose2d(
            x,
            weight,
            bias,
            layer.stride,
            layer.padding,  # type: ignore[arg-type]
            layer.output_padding,
            layer.groups,
            layer.dilation,
        )
    conv = cast(nn.Conv2d, layer)
    return cast(Tensor, conv._conv_forward(x, weight, bias))
