"""NNCF's quantizers in this package's words: step, zero point and grid, to learn in and to carry few bits in 8.

NNCF keeps the end of a range, ``scale``, or its beginning and length, ``input_low`` and ``input_range``; a step is one
of the grid's levels of it. NNCF's own parameters learn, through NNCF's own forward: the only thing changed for that
time is that lengths are stored as logarithms, for which NNCF has a switch, so that no step makes one negative.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from repapq_plugin.hosts.nncf._compat import (
    AsymmetricQuantizer,
    BaseQuantizer,
    StatefulModuleInterface,
    SymmetricQuantizer,
    length_of,
    store_as_logarithm,
)
from repapq_plugin.method.sites import Quantizer
from repapq_plugin.observers import RangeObserver
from repapq_plugin.policy import observer_class

CARRIER_BITS = 8
"""What runtimes have kernels for; grids of fewer bits are carried inside."""

_TINY = float(torch.finfo(torch.float32).tiny)


def step_of(quantizer: BaseQuantizer) -> Tensor:
    """Return the step size, float, of the shape of NNCF's parameters, without gradient."""
    length: Tensor = quantizer.input_range if isinstance(quantizer, AsymmetricQuantizer) else quantizer.scale
    levels = quantizer.levels - 1 if isinstance(quantizer, AsymmetricQuantizer) else quantizer.level_high
    step: Tensor = length.detach().abs() / levels
    return step


@torch.no_grad()
def set_qparams(quantizer: BaseQuantizer, scale: Tensor, zero_point: Tensor) -> None:
    """Set step size (float, positive) and zero point (integers); symmetric quantizers have none and ignore it."""
    step = scale.reshape(quantizer.scale_shape).to(next(quantizer.parameters()).device).clamp_min(_TINY)
    if isinstance(quantizer, AsymmetricQuantizer):
        zero = zero_point.reshape(quantizer.scale_shape).to(step)
        quantizer.input_low.copy_((quantizer.level_low - zero) * step)
        length_of(quantizer).copy_(step * (quantizer.levels - 1))
    else:
        length_of(quantizer).copy_(step * quantizer.level_high)


@torch.no_grad()
def set_num_bits(quantizer: BaseQuantizer, num_bits: int) -> None:
    """Give the quantizer another number of levels over the same range, NNCF's signs and narrowness kept."""
    quantizer.num_bits = num_bits


def observer_for(quantizer: BaseQuantizer, name: str, **extra: float) -> RangeObserver:
    """Return an observer of the quantizer's own grid.

    Args:
        quantizer: Per tensor, or per channel along one axis.
        name: A name that a configuration uses.
        **extra: Further arguments of the observer.
    """
    per_channel = quantizer.scale_shape != (1,)
    kind = "per_channel" if per_channel else "per_tensor"
    signed = quantizer.level_low < 0
    symmetric = isinstance(quantizer, SymmetricQuantizer) and signed
    scheme: torch.qscheme = getattr(torch, f"{kind}_{'symmetric' if symmetric else 'affine'}")
    observer = observer_class(name, per_channel=per_channel)(
        dtype=torch.qint8 if signed else torch.quint8,
        qscheme=scheme,
        quant_min=quantizer.level_low,
        quant_max=quantizer.level_high,
        ch_axis=channel_axis(quantizer) or 0,
        **extra,
    )
    return observer.to(next(quantizer.parameters()).device)


def channel_axis(quantizer: BaseQuantizer) -> int | None:
    """Return the axis along which the quantizer has a range each, ``None`` if it has one for all."""
    if quantizer.scale_shape == (1,):
        return None
    return max(range(len(quantizer.scale_shape)), key=lambda axis: int(quantizer.scale_shape[axis]))


def learnable(quantizer: BaseQuantizer) -> dict[str, nn.Parameter]:
    """Return the parameters of the quantizer that learn, by name."""
    found = {"length": length_of(quantizer)}
    if isinstance(quantizer, AsymmetricQuantizer):
        found["input_low"] = quantizer.input_low
    return found


@contextmanager
def in_logarithms(quantizers: Iterable[BaseQuantizer]) -> Iterator[None]:
    """Let NNCF keep the lengths of ranges as logarithms for a while."""
    chosen = [quantizer for quantizer in quantizers if not quantizer.is_using_log_scale_storage]
    with torch.no_grad():
        for quantizer in chosen:
            length_of(quantizer).abs_().clamp_min_(_TINY).log_()
            store_as_logarithm(quantizer, True)
    try:
        yield
    finally:
        with torch.no_grad():
            for quantizer in chosen:
                store_as_logarithm(quantizer, False)
                length_of(quantizer).exp_()


class CorrectedBias:
    """A bias to which NNCF has added what rounding the weight takes away; while nothing rounds it is the float one.

    Args:
        bias: The bias in the quantized network.
        of_float: The same in the float network.
    """

    def __init__(self, bias: Tensor, of_float: Tensor) -> None:
        self.bias, self.of_float = bias, of_float.detach()
        self._corrected: Tensor | None = None

    @torch.no_grad()
    def correct(self, enabled: bool) -> None:
        """Take the correction away for a while, or put it back; again is harmless."""
        if not enabled and self._corrected is None:
            self._corrected = self.bias.detach().clone()
            self.bias.copy_(self.of_float)
        elif enabled and self._corrected is not None:
            self.bias.copy_(self._corrected)
            self._corrected = None


class NNCFQuantizer(Quantizer):
    """One of NNCF's quantizers as a `Quantizer` of the method.

    Args:
        quantizer: NNCF's.
        bias: What NNCF corrected for this quantizer's sake, if it did.
    """

    def __init__(self, quantizer: BaseQuantizer, bias: CorrectedBias | None = None) -> None:
        self.quantizer, self.bias = quantizer, bias

    @property
    def module(self) -> nn.Module:
        """See `Quantizer`."""
        module: nn.Module = self.quantizer
        return module

    @property
    def bounds(self) -> tuple[int, int]:
        """See `Quantizer`."""
        return self.quantizer.level_low, self.quantizer.level_high

    @property
    def ch_axis(self) -> int | None:
        """See `Quantizer`."""
        return channel_axis(self.quantizer)

    def observer(self, name: str, **arguments: float) -> RangeObserver:
        """See `Quantizer`."""
        return observer_for(self.quantizer, name, **arguments)

    def qparams(self) -> tuple[Tensor, Tensor]:
        """See `Quantizer`."""
        step = step_of(self.quantizer)
        zero_point = torch.zeros_like(step)
        if isinstance(self.quantizer, AsymmetricQuantizer):
            zero_point = self.quantizer.level_low - torch.round(self.quantizer.input_low.detach() / step)
        return step.flatten(), zero_point.flatten().to(torch.int64)

    def set_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        """See `Quantizer`."""
        set_qparams(self.quantizer, scale, zero_point)

    @property
    def quantizing(self) -> bool:
        """See `Quantizer`."""
        return bool(self.quantizer.enabled.item())

    @quantizing.setter
    def quantizing(self, enabled: bool) -> None:
        self.quantizer.enabled.fill_(int(enabled))
        if self.bias is not None:
            self.bias.correct(enabled)


class RangeClamp(StatefulModuleInterface, nn.Module):  # type: ignore[misc]
    """Clamps a tensor to the range of a grid of few bits, in front of a quantizer of 8 bits with the same step.

    Args:
        min_val: Real value of the grid's smallest code.
        max_val: Real value of its largest.
    """

    def __init__(self, min_val: float, max_val: float) -> None:
        super().__init__()
        self.min_val, self.max_val = min_val, max_val

    def forward(self, x: Tensor) -> Tensor:
        """Clamp ``x``, any shape."""
        return torch.clamp(x, self.min_val, self.max_val)

    def get_config(self) -> dict[str, float]:
        """Return what `from_config` builds an equal one from."""
        return {"min_val": self.min_val, "max_val": self.max_val}

    @classmethod
    def from_config(cls, state: dict[str, float]) -> RangeClamp:
        """Build one from what `get_config` returned."""
        return cls(**state)


@torch.no_grad()
def carry(quantizer: BaseQuantizer) -> RangeClamp | None:
    """Turn a quantizer of few bits into one of 8 with the same step.

    Returns:
        What must stand in front of it, so that codes beyond the few bits do not occur; ``None`` if it has 8 already.
    """
    if quantizer.num_bits == CARRIER_BITS:
        return None
    step = step_of(quantizer)
    zero_point = torch.zeros_like(step)
    if isinstance(quantizer, AsymmetricQuantizer):
        # NNCF moves the range so that zero is a code; what it moved it to is what counts.
        low, high = quantizer.get_input_low_input_high()
        step = (high - low) / (quantizer.levels - 1)
        zero_point = torch.round(-low / step)
    low = (quantizer.level_low - zero_point) * step
    high = (quantizer.level_high - zero_point) * step
    set_num_bits(quantizer, CARRIER_BITS)
    set_qparams(quantizer, step, zero_point)
    return RangeClamp(float(low.min()), float(high.max()))
