"""Where a network is quantized, in words that hold for every host's quantizers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from repapq_plugin.observers import RangeObserver


class Quantizer(ABC):
    """One quantizer of a network: a grid, and the module that rounds to it, whoever wrote that."""

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """What is called with the tensor and returns it rounded, or as it is while `quantizing` is off."""

    @property
    @abstractmethod
    def bounds(self) -> tuple[int, int]:
        """``(quant_min, quant_max)`` of the grid."""

    @property
    @abstractmethod
    def ch_axis(self) -> int | None:
        """The axis along which each slice has a scale of its own; ``None``: one scale for all."""

    @property
    def power_of_two(self) -> bool:
        """Whether scales are rounded to powers of two."""
        return False

    @abstractmethod
    def observer(self, name: str, **arguments: float) -> RangeObserver:
        """Return a new observer of this grid, on its device.

        Args:
            name: A name that a configuration uses, for a tensor: ``"mse"``.
            **arguments: What else the observer is told.
        """

    @abstractmethod
    def qparams(self) -> tuple[Tensor, Tensor]:
        """Return ``scale`` (float) and ``zero_point`` (int64), ``(1,)`` or ``(channels,)``, without gradient."""

    @abstractmethod
    def set_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set them."""

    @property
    @abstractmethod
    def quantizing(self) -> bool:
        """Whether it rounds; while it does not, tensors pass as they are."""

    @quantizing.setter
    @abstractmethod
    def quantizing(self, enabled: bool) -> None: ...


@dataclass(frozen=True)
class WeightSite:
    """A layer whose weight is quantized.

    Args:
        name: Module path of the layer in the float network.
        layer: The layer in the quantized network, with its float weight and bias.
        quantizer: The quantizer of the weight.
        float_forward: Runs the layer's own forward, unquantized and unseen, on the arguments of a call.
    """

    name: str
    layer: nn.Module
    quantizer: Quantizer
    float_forward: Callable[..., Tensor]


@dataclass(frozen=True)
class ActivationSite:
    """A tensor that is quantized on its way to layers.

    Args:
        where: What to call it in a message: ``"The input of 'stem'"``.
        quantizer: Its quantizer.
    """

    where: str
    quantizer: Quantizer


@dataclass(frozen=True)
class Sites:
    """All quantized weights, by the module path of their layer, and all quantized activations."""

    weights: dict[str, WeightSite]
    activations: tuple[ActivationSite, ...]

    @property
    def quantizers(self) -> list[Quantizer]:
        """Every quantizer, those of weights first."""
        of_weights = [site.quantizer for site in self.weights.values()]
        return of_weights + [site.quantizer for site in self.activations]

    def ranges(self) -> dict[str, Tensor]:
        """Return all that the quantizers hold, by their order."""
        named = enumerate(quantizer.module for quantizer in self.quantizers)
        return {f"{index}/{key}": value for index, module in named for key, value in module.state_dict().items()}

    def load_ranges(self, saved: Mapping[str, Tensor]) -> None:
        """Bring back what `ranges` returned.

        Raises:
            RuntimeError: Other quantizers were saved.
        """
        states: dict[str, dict[str, Tensor]] = {}
        for name, value in saved.items():
            index, _, key = name.partition("/")
            states.setdefault(index, {})[key] = value
        for position, quantizer in enumerate(self.quantizers):
            quantizer.module.load_state_dict(states.get(str(position), {}))
