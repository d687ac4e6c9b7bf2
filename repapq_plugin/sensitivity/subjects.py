"""Whose bits are decided: units with their weights, their products, and what a width makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from repapq_plugin.core.hooks import Hooks
from repapq_plugin.core.tensors import first_tensor
from repapq_plugin.method.partition import Unit
from repapq_plugin.quantizers.layers import output_channels, weight_of
from repapq_plugin.quantizers.plan import LayerPlan
from repapq_plugin.sensitivity.table import Option
from repapq_plugin.sensitivity.widths import Bits

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Subject:
    """A unit whose bits are decided.

    Args:
        unit: The unit.
        model: The merged float network.
        products: See `products_of`.
        plans: How all layers are quantized, by the width that is given to all units.

    Attributes:
        weights: Its distinct weights, each by the path of one layer that has it.
        plans: How its layers are quantized at each width that it can get.
    """

    def __init__(
        self,
        unit: Unit,
        model: nn.Module,
        products: Mapping[str, int],
        plans: Mapping[Bits, Mapping[str, LayerPlan]],
    ) -> None:
        self.unit, self.products = unit, products
        of_layers = {name: weight_of(model.get_submodule(name)) for name in unit.layers}
        distinct = {id(weight): name for name, weight in of_layers.items()}
        self.weights = {name: of_layers[name] for name in distinct.values()}
        self.plans = {bits: {name: plan[name] for name in unit.layers} for bits, plan in plans.items()}
        if len({tuple(plan.bits for plan in plans.values()) for plans in self.plans.values()}) == 1:
            self.plans = dict([next(iter(self.plans.items()))])

    @property
    def size(self) -> int:
        """How many weights it holds."""
        return sum(weight.numel() for weight in self.weights.values())

    @property
    def pinned(self) -> bool:
        """Whether the configuration leaves no choice."""
        return len(self.plans) == 1

    def option(self, bits: Bits, noise: float, mae: float) -> Option:
        """Return what was measured at a width with what the width costs."""
        plan = self.plans[bits]
        return Option(
            bits=plan[self.unit.layers[0]].bits if self.pinned else bits,
            layers={name: plan[name].bits for name in self.unit.layers},
            noise=noise,
            mae=mae,
            weight_bits=sum(weight.numel() * plan[name].weight_bits for name, weight in self.weights.items()),
            bit_operations=sum(self.products[name] * math.prod(plan[name].bits) for name in self.unit.layers),
        )


def deciding_together(units: Sequence[Unit], model: nn.Module) -> list[Unit]:
    """Let units that share a weight be one: it has one number of bits."""
    weights = {unit: {id(weight_of(model.get_submodule(name))) for name in unit.layers} for unit in units}
    together: list[list[Unit]] = []
    for unit in units:
        sharing = [each for each in together if any(weights[unit] & weights[other] for other in each)]
        if sharing:
            sharing[0] += [*(other for each in sharing[1:] for other in each), unit]
            together = [each for each in together if not any(each is other for other in sharing[1:])]
        else:
            together.append([unit])
    return [Unit(each[0].name, tuple(name for unit in each for name in unit.layers)) for each in together]


@torch.no_grad()
def products_of(model: nn.Module, layers: Iterable[str], run: Callable[[], object]) -> dict[str, int]:
    """Return how many products each layer makes of one sample: one for each place and each of its weights.

    Args:
        model: The merged float network.
        layers: Module paths.
        run: Makes one forward pass of it. The first layer that is called gets one row of each sample.
    """
    counts = dict.fromkeys(layers, 0)
    samples: list[int] = []

    def counting(name: str) -> Callable[..., None]:
        def count(layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: Tensor) -> None:
            x = cast(Tensor, first_tensor(args, kwargs))
            samples.append(len(x) if x.dim() > 1 else 1)
            if isinstance(layer, TRANSPOSED):
                places = x.numel() // layer.in_channels
            else:
                places = output.numel() // output_channels(layer)
            counts[name] += places * weight_of(layer).numel()

        return count

    with Hooks() as hooks:
        for name in counts:
            hooks.after(model.get_submodule(name), counting(name), with_kwargs=True)
        run()
    return {name: count // max(1, samples[0]) for name, count in counts.items()}


def bytes_of(tensors: Iterable[Tensor], besides: Iterable[Tensor]) -> int:
    """Return the bytes of distinct tensors without some of them."""
    left = {id(tensor) for tensor in besides}
    distinct = {id(tensor): tensor for tensor in tensors if id(tensor) not in left}
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())
