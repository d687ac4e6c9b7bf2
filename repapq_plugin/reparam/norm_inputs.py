"""Which layer's output every norm is given, seen in one run; through reshaping and transposing as well."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from repapq_plugin.core.tensor_notes import TensorNotes
from repapq_plugin.core.tensors import first_tensor
from repapq_plugin.core.watch import MakersWatch

REGROUPINGS = {name: name for name in ("flatten", "unflatten", "reshape", "reshape_as", "squeeze", "unsqueeze")} | {
    **{name: name for name in ("transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t")},
    **{name: name for name in ("contiguous", "clone", "detach")},
    # Reshaping also goes where the strides of what stands in for the tensor do not allow a view.
    "view": "reshape",
    "view_as": "reshape_as",
}
"""Functions that move values and change none, by name, with the tensor method that does the same."""

CHANNELS = 1
"""The axis of a batch norm's channels."""


def channel_axis(layer: nn.Module, output: Tensor) -> int:
    """Return the axis of the output channels of a convolution or linear layer."""
    return output.dim() - 1 if isinstance(layer, nn.Linear) else output.dim() - cast(Tensor, layer.weight).dim() + 1


class NormInputs(MakersWatch):
    """Sees, over one run, which layer's output every norm was given, and who else used such an output."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[nn.Module, list[nn.Module | None]] = {}
        """By norm, call after call, the layer whose channels it normalised; None for any other input."""
        self._axes: TensorNotes[int] = TensorNotes()

    def layer_ran(self, layer: nn.Module, _: tuple[object, ...], output: object) -> None:
        """Note the output of a convolution or linear layer."""
        self.calls[layer] += 1
        self.made(layer, output)
        if isinstance(output, Tensor):
            self._axes.put(output, channel_axis(layer, output))

    def norm_runs(self, norm: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Note what a norm is given; whatever it does with that is no other use."""
        x = first_tensor(args, kwargs)
        self.reading = [] if x is None else [x]
        maker = self.maker_of(x) if self._axes.get(x) == CHANNELS else None
        if maker is None:
            self.reading = []
        self.given.setdefault(norm, []).append(maker)

    def norm_ran(self, *_: object) -> None:
        """The norm is through."""
        self.reading = []

    def after(
        self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object], result: object, note: object
    ) -> None:
        """A regrouped output still is the layer's; anything else uses it."""
        source = args[0] if args else None
        maker, axis = self.maker_of(source), self._axes.get(source)
        if name in REGROUPINGS and maker is not None and axis is not None and isinstance(source, Tensor):
            moved = _axis_behind(REGROUPINGS[name], source, axis, args[1:], kwargs, result)
            if moved is not None:
                self.made(maker, result)
                self._axes.put(cast(Tensor, result), moved)
                return
        super().after(name, args, kwargs, result, note)

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Layers all of whose outputs went to one norm and nowhere else, the norm being given nothing else."""
        norms = Counter(layer for layers in self.given.values() for layer in set(layers))
        found = []
        for norm, layers in self.given.items():
            layer = layers[0]
            only_one = layer is not None and all(other is layer for other in layers)
            if layer is not None and only_one and self.calls[layer] == len(layers) and norms[layer] == 1:
                found.append((layer, norm))
        return [(layer, norm) for layer, norm in found if layer not in self.used_elsewhere]


def _axis_behind(
    method: str, source: Tensor, axis: int, args: tuple[object, ...], kwargs: Mapping[str, object], result: object
) -> int | None:
    """Return along which axis of a regrouped tensor the channels lie, or None where they do not lie along one.

    The same is done to a tensor that holds the number of its channel everywhere.
    """
    numbers = torch.arange(source.shape[axis], device=source.device)

    def along(place: int, shape: torch.Size) -> Tensor:
        return numbers.reshape([-1 if dim == place else 1 for dim in range(len(shape))]).expand(shape)

    try:
        regroup = cast(Callable[..., Tensor], getattr(Tensor, method))
        moved = regroup(along(axis, source.shape), *args, **kwargs)
    except (RuntimeError, TypeError, IndexError, ValueError):
        return None
    if not isinstance(result, Tensor) or moved.shape != result.shape:
        return None
    fitting = (dim for dim in range(moved.dim()) if moved.shape[dim] == len(numbers))
    return next((dim for dim in fitting if torch.equal(moved, along(dim, moved.shape))), None)
