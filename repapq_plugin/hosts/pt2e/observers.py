"""Our observers on torchao's base class. Each lets the one of the same name in `repapq_plugin.observers` watch."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torchao.quantization.pt2e import ObserverBase

from repapq_plugin import observers as core
from repapq_plugin.errors import HostError

OBSERVERS: dict[str, type[TorchaoObserver]] = {}
"""Classes of this module by the name a configuration uses."""

TORCH_AO_TYPES = {torch.uint8: torch.quint8, torch.int8: torch.qint8}
"""torchao names an integer type where torch.ao has a type of its own."""


def torch_ao_type(kind: type, dtype: torch.dtype | None) -> torch.dtype:
    """Return torch.ao's name of ``dtype``.

    Raises:
        HostError: ``kind`` was not called as pt2e calls it: it stands in a flow of torch.ao.
    """
    if dtype not in TORCH_AO_TYPES:
        raise HostError(
            f"{kind.__module__}.{kind.__name__} got dtype={dtype}; pt2e says torch.uint8 or torch.int8. "
            f"In a QConfig of torch.ao name repapq_plugin.{kind.__name__} instead."
        )
    return TORCH_AO_TYPES[dtype]


class TorchaoObserver(ObserverBase):  # type: ignore[misc]
    """Watches tensors for pt2e.

    A subclass says whom it lets watch: ``class MAEObserver(TorchaoObserver, watches=core.MAEObserver)``.

    Args:
        dtype: ``torch.uint8`` or ``torch.int8``; pt2e says which.
        is_dynamic: Must be false.
        **kwargs: See the observer that watches.

    Raises:
        HostError: Called by something other than pt2e.
        ConfigError: A value is not allowed.
    """

    watches: ClassVar[type[core.RangeObserver]]

    def __init_subclass__(cls, watches: type[core.RangeObserver]) -> None:
        super().__init_subclass__()
        cls.watches = watches
        OBSERVERS.update({name: cls for name, watched in core.OBSERVERS.items() if watched is watches})

    def __init__(self, dtype: torch.dtype | None = None, is_dynamic: bool = False, **kwargs: object) -> None:
        inner = torch_ao_type(type(self), dtype)
        super().__init__(dtype=dtype, is_dynamic=is_dynamic)
        watcher: Callable[..., core.RangeObserver] = self.watches
        self.observer = watcher(dtype=inner, is_dynamic=is_dynamic, **kwargs)
        self.qscheme, self.ch_axis = self.observer.qscheme, self.observer.ch_axis
        self.quant_min, self.quant_max = self.observer.quant_min, self.observer.quant_max

    def forward(self, x: Tensor) -> Tensor:
        """Observe ``x`` (float, any shape) and hand it on unchanged."""
        observed: Tensor = self.observer(x)
        return observed

    def calculate_qparams(self, **_: object) -> tuple[Tensor, Tensor]:
        """Return ``scale`` (float32) and ``zero_point`` (int64), ``(1,)`` or ``(channels,)``."""
        return self.observer.calculate_qparams()


class MinMaxObserver(TorchaoObserver, watches=core.MinMaxObserver):
    """The smallest and the largest value, for pt2e."""


class PerChannelMinMaxObserver(TorchaoObserver, watches=core.PerChannelMinMaxObserver):
    """The smallest and the largest value of each channel, for pt2e."""


class MSEObserver(TorchaoObserver, watches=core.MSEObserver):
    """The range of the smallest mean squared error, for pt2e."""


class PerChannelMSEObserver(TorchaoObserver, watches=core.PerChannelMSEObserver):
    """The range of the smallest mean squared error in each channel, for pt2e."""


class MAEObserver(TorchaoObserver, watches=core.MAEObserver):
    """The range of the smallest mean absolute error, for pt2e."""


class PercentileObserver(TorchaoObserver, watches=core.PercentileObserver):
    """The range between two percentiles, for pt2e."""
