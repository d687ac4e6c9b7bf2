"""Whether layers whose channels were changed still give what they gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from repapq_plugin.conditioning.channels import Layer
from repapq_plugin.core import ranks
from repapq_plugin.core.compare import equal_within, rounding_of
from repapq_plugin.core.hooks import Hooks, unseen
from repapq_plugin.core.tensors import tensors_of

Link = tuple[Layer, list[Layer]]
"""A layer that is changed, and those that are changed with it: what reads its output."""


class Judge:
    """Judges each layer by its own output, on the very inputs that it had before anything was changed.

    Behind a layer the network goes on with what the layer gave before, divided where it is to be: rounding of one layer
    meets no other one, and no choice that the network makes (a detector's best queries) that could make much of it.
    What the network returns has to stay the same all the same: it changes where something else reads a weight.

    Args:
        run: Makes a forward pass of the network; called now, before anything is changed.
        links: All that may be changed.
    """

    def __init__(self, run: Callable[[], object], links: Sequence[Link]) -> None:
        self._run = run
        layers = list(dict.fromkeys(layer for first, others in links for layer in (first, *others)))
        self._held = [
            (layer, name, value, None if value is None else value.detach().clone())
            for layer in layers
            for name, value in layer._parameters.items()
        ]
        self._gave: dict[Layer, list[Tensor]] = {layer: [] for layer in layers}
        with Hooks() as hooks:
            for layer in layers:
                hooks.after(layer, self._note)
            self._wanted = _outputs(run)
        self._tolerance = rounding_of([*self._wanted, *(value for *_, value in self._held if value is not None)])

    def _note(self, layer: Layer, _: object, output: object) -> None:
        with unseen():
            self._gave[layer] += [tensor.detach().clone() for tensor in tensors_of(output)]

    def guilty(self, links: Sequence[Link], scales: Mapping[Layer, Tensor]) -> list[Link]:
        """Return the links in which a layer gives something else, or all if only the network does; rank 0 says which.

        Args:
            links: What is changed now.
            scales: By what each channel of a layer's output was divided, float64 ``[channels]``.
        """
        differing: set[Layer] = set()
        left = {layer: list(tensors) for layer, tensors in self._gave.items()}

        def compare(layer: Layer, _: object, output: object) -> object:
            with unseen():
                if not isinstance(output, Tensor) or not left[layer]:
                    differing.add(layer)
                    return None
                expected = left[layer].pop(0)
                if layer in scales:
                    expected = _divided(layer, expected, scales[layer])
                if not equal_within([output], [expected], self._tolerance, terms=self._bias(layer)):
                    differing.add(layer)
                return expected.clone()

        with Hooks() as hooks:
            for layer in left:
                hooks.after(layer, compare)
            actual = _outputs(self._run)
        found = [place for place, link in enumerate(links) if not differing.isdisjoint((link[0], *link[1]))]
        if not found and not equal_within(actual, self._wanted, self._tolerance):
            found = list(range(len(links)))
        return [links[place] for place in ranks.first(lambda: found)]

    def _bias(self, layer: Layer) -> float:
        """Return the largest bias, before or now: sums that nearly cancel are no better than their terms."""
        biases = [layer.bias, *(value for held, name, _, value in self._held if held is layer and name == "bias")]
        return max((float(bias.abs().max()) for bias in biases if bias is not None and bias.numel()), default=0.0)

    @torch.no_grad()
    def restore(self) -> None:
        """Give all layers what they held at first."""
        for layer, name, parameter, value in self._held:
            if parameter is not None and value is not None:
                parameter.copy_(value)
            layer._parameters[name] = parameter


def _divided(layer: Layer, output: Tensor, scales: Tensor) -> Tensor:
    shape = (-1,) if isinstance(layer, nn.Linear) else (-1, *[1] * (layer.weight.dim() - 2))
    return (output.double() / scales.to(output.device).reshape(shape)).to(output.dtype)


def _outputs(run: Callable[[], object]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors_of(run())]
