"""Our fake quantizers on torchao's base class as well as torch.ao's."""

from __future__ import annotations

from typing import Any

import torch
from torchao.quantization.pt2e import FakeQuantizeBase

from repapq_plugin.hosts.pt2e.observers import (
    MinMaxObserver,
    PerChannelMinMaxObserver,
    TorchaoObserver,
    torch_ao_type,
)
from repapq_plugin.observers import RangeObserver
from repapq_plugin.quantizers import fake_quantize as core


class LearnableFakeQuantize(core.LearnableFakeQuantize, FakeQuantizeBase):  # type: ignore[misc]
    """`repapq_plugin.LearnableFakeQuantize` for pt2e.

    Args:
        observer: One of this host's observers (or a partial of one).
        dtype: ``torch.uint8`` or ``torch.int8``; pt2e says which.
        **kwargs: See `repapq_plugin.LearnableFakeQuantize`.

    Raises:
        HostError: Called by something other than pt2e.
        ConfigError: A value is not allowed.
    """

    def __init__(self, observer: Any = MinMaxObserver, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        inner = torch_ao_type(type(self), dtype)

        def watch(**arguments: Any) -> RangeObserver:
            made = observer(**{**arguments, "dtype": dtype})
            watched: RangeObserver = made.observer if isinstance(made, TorchaoObserver) else made
            return watched

        super().__init__(observer=watch, dtype=inner, **kwargs)
        self.dtype = dtype

    @classmethod
    def with_args(cls, **kwargs: Any) -> Any:
        """Return a factory of this class with some arguments set, as torchao's fake quantizers do."""
        return FakeQuantizeBase.with_args.__func__(cls, **kwargs)

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
        )
        made.enable_observer(False)
        made.set_qparams(learned.scale, learned.zero_point)
        with torch.no_grad():
            made.log_scale.copy_(learned.log_scale)  # a logarithm of an exponential would round
        made.enable_fake_quant(learned.quantizing)
        return made


class PerChannelLearnableFakeQuantize(LearnableFakeQuantize):
    """`LearnableFakeQuantize` with a scale per channel; the name is what pt2e looks for."""

    def __init__(self, observer: Any = PerChannelMinMaxObserver, **kwargs: Any) -> None:
        kwargs.setdefault("qscheme", torch.per_channel_symmetric)
        super().__init__(observer=observer, **kwargs)
