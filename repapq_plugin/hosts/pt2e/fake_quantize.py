"""Our fake quantizers on torchao's base class as well as torch.ao's."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn
from torchao.quantization.pt2e import FakeQuantizeBase

from repapq_plugin.hosts.pt2e._compat import factory_of
from repapq_plugin.hosts.pt2e.observers import (
    MinMaxObserver,
    PerChannelMinMaxObserver,
    TorchaoObserver,
    torch_ao_type,
)
from repapq_plugin.quantizers import fake_quantize as core


class LearnableFakeQuantize(core.LearnableFakeQuantize, FakeQuantizeBase):  # type: ignore[misc]
    """`repapq_plugin.LearnableFakeQuantize` for pt2e.

    Args:
        observer: One of this host's observers (or a partial of one); default: `MinMaxObserver`.
        dtype: ``torch.uint8`` or ``torch.int8``; pt2e says which.
        quant_min: Smallest integer of the grid; default: the observer's.
        quant_max: Largest integer of the grid; default: the observer's.
        is_dynamic: Must be false.
        drop_probability: See `repapq_plugin.LearnableFakeQuantize`.
        **observer_kwargs: Handed to ``observer``.

    Raises:
        HostError: Called by something other than pt2e.
        ConfigError: A value is not allowed.
    """

    observes_by: ClassVar[type[TorchaoObserver]] = MinMaxObserver
    """The observer where none is named."""

    scheme: ClassVar[torch.qscheme | None] = None
    """The ``qscheme`` where none is named; ``None``: the observer's."""

    def __init__(
        self,
        observer: Callable[..., nn.Module] | None = None,
        dtype: torch.dtype | None = None,
        quant_min: int | None = None,
        quant_max: int | None = None,
        is_dynamic: bool = False,
        drop_probability: float = 0.0,
        power_of_two: bool = False,
        **observer_kwargs: object,
    ) -> None:
        inner = torch_ao_type(type(self), dtype)
        make: Callable[..., nn.Module] = observer or self.observes_by

        def watch(**arguments: object) -> nn.Module:
            made = make(**{**arguments, "dtype": dtype})
            return made.observer if isinstance(made, TorchaoObserver) else made

        if self.scheme is not None:
            observer_kwargs.setdefault("qscheme", self.scheme)
        super().__init__(
            watch, quant_min, quant_max, is_dynamic, drop_probability, power_of_two, dtype=inner, **observer_kwargs
        )
        self.dtype = dtype

    @classmethod
    def with_args(cls, **kwargs: object) -> Callable[..., LearnableFakeQuantize]:
        """Return a factory of this class with some arguments set, as torchao's fake quantizers do."""
        return factory_of(cls, **kwargs)

    @classmethod
    def adopt(cls, learned: core.LearnableFakeQuantize) -> LearnableFakeQuantize:
        """Return one with grid, scale and zero point of a calibrated quantizer, bit for bit; it observes nothing."""
        watched = learned.activation_post_process
        made = cls(
            observer=PerChannelMinMaxObserver if learned.per_channel else MinMaxObserver,
            dtype=torch.uint8 if learned.quant_min >= 0 else torch.int8,
            qscheme=watched.qscheme,
            quant_min=learned.quant_min,
            quant_max=learned.quant_max,
            ch_axis=learned.ch_axis,
            power_of_two=learned.power_of_two,
        )
        made.enable_observer(False)
        made.set_qparams(learned.scale, learned.zero_point)
        with torch.no_grad():
            made.log_scale.copy_(learned.log_scale)  # a logarithm of an exponential would round
        made.enable_fake_quant(learned.quantizing)
        return made


class PerChannelLearnableFakeQuantize(LearnableFakeQuantize):
    """`LearnableFakeQuantize` with a scale per channel; the name is what pt2e looks for."""

    observes_by = PerChannelMinMaxObserver
    scheme = torch.per_channel_symmetric
