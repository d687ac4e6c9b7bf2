"""Fake quantizers whose scale learns, on torch.ao's ``FakeQuantizeBase``."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.ao.quantization.fake_quantize import FakeQuantizeBase
from torch.autograd.function import FunctionCtx

from repapq_plugin.core.quant_primitives import powers_around
from repapq_plugin.errors import ConfigError
from repapq_plugin.observers.base import RangeObserver, named_factory, refuse_pt2e
from repapq_plugin.observers.min_max import MinMaxObserver, PerChannelMinMaxObserver
from repapq_plugin.quantizers.rounding import round_to_grid

_FLOAT = torch.finfo(torch.float32)
LOG_LIMITS = (math.log(_FLOAT.tiny), math.log(_FLOAT.max) - 1)
"""Where the logarithm of a scale may go: beyond, float32 would make a zero or an infinity of it."""


class _NearestPowerOfTwo(torch.autograd.Function):
    """The power of two whose logarithm is nearest; gradients pass straight through."""

    @staticmethod
    def forward(ctx: FunctionCtx, scale: Tensor) -> Tensor:
        """Round ``scale``, float and positive."""
        low, high = powers_around(scale)
        return torch.where(scale < math.sqrt(2) * low, low, high)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> Tensor:
        """Hand the gradient on."""
        return gradients[0]


def nearest_power_of_two(scale: Tensor) -> Tensor:
    """Return powers of two, exactly, of the shape and dtype of positive scales."""
    return cast(Tensor, _NearestPowerOfTwo.apply(scale))  # type: ignore[no-untyped-call]


class LearnableFakeQuantize(FakeQuantizeBase):
    """Quantizes and dequantizes; gradients reach the input and the scale.

    The scale is kept as its logarithm, so a step of any optimizer leaves it positive. Rounding
    passes gradients straight through; the scale's gradient is that of learned step sizes (LSQ,
    arXiv:1902.08153); see `repapq_plugin.quantizers.rounding`.

    While observing, inputs go to the observer; once quantizing starts, its range is turned into the
    starting scale and zero point.

    Args:
        observer: Class (or partial) of a `RangeObserver`.
        quant_min: Smallest integer of the grid; default: the observer's.
        quant_max: Largest integer of the grid; default: the observer's.
        is_dynamic: Must be false.
        drop_probability: While in training mode, the share of values that stay unquantized (QDrop,
            arXiv:2203.05740).
        power_of_two: Use the power of two that is nearest to the learned scale; the learned one gets its gradient.
        **observer_kwargs: Handed to ``observer``.

    Raises:
        ConfigError: A value is not allowed.
        HostError: Made by torchao's pt2e; the message names the class to take there.
    """

    observer_enabled: Tensor
    fake_quant_enabled: Tensor
    zero_point: Tensor

    def __init__(
        self,
        observer: Any = MinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        is_dynamic: bool = False,
        drop_probability: float = 0.0,
        power_of_two: bool = False,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__()
        refuse_pt2e(type(self), observer_kwargs.get("dtype", torch.quint8))
        if not 0 <= drop_probability <= 1:
            raise ConfigError(f"drop_probability={drop_probability!r} is not allowed; choose a number from 0 to 1.")
        if quant_min is not None:
            observer_kwargs["quant_min"] = quant_min
        if quant_max is not None:
            observer_kwargs["quant_max"] = quant_max
        watched = observer(is_dynamic=is_dynamic, **observer_kwargs)
        if not isinstance(watched, RangeObserver):
            raise ConfigError(f"observer={observer!r} is not allowed; choose one of repapq_plugin.observers.")
        self.activation_post_process = watched
        self.quant_min, self.quant_max = watched.quant_min, watched.quant_max
        self.dtype, self.qscheme, self.ch_axis = watched.dtype, watched.qscheme, watched.ch_axis
        self.is_dynamic = is_dynamic
        self.drop_probability = drop_probability
        self.power_of_two = power_of_two
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int64))
        # Python flags beside the buffers of the base class: reading a tensor in every forward
        # stalls an accelerator and cannot be exported.
        self.observing, self.quantizing = True, True

    @classmethod
    def with_args(cls, **kwargs: Any) -> Any:
        """Return a factory of this class with some arguments set, as torch.ao's fake quantizers do."""
        return named_factory(super().with_args(**kwargs), cls)  # type: ignore[no-untyped-call]

    @property
    def num_bits(self) -> int:
        """Bits that the grid's integers need."""
        return (self.quant_max - self.quant_min).bit_length()

    @property
    def scale(self) -> Tensor:
        """Step size, float, ``(1,)`` or ``(channels,)``, always positive."""
        scale = self.log_scale.clamp(LOG_LIMITS[0], LOG_LIMITS[1]).exp()
        return nearest_power_of_two(scale) if self.power_of_two else scale

    @property
    def reach(self) -> int:
        """How many steps the end of the range lies from where the grid is held: zero if symmetric, else its start."""
        symmetric = self.activation_post_process.symmetric and self.quant_min < 0
        return self.quant_max if symmetric else self.quant_max - self.quant_min

    @property
    def per_channel(self) -> bool:
        """Whether each slice along ``ch_axis`` has a scale of its own."""
        return self.activation_post_process.per_channel

    def enable_observer(self, enabled: bool = True) -> None:
        """Start (or stop) feeding inputs to the observer."""
        self.observing = bool(enabled)
        self.observer_enabled[0] = int(enabled)

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Start (or stop) quantizing."""
        self.quantizing = bool(enabled)
        self.fake_quant_enabled[0] = int(enabled)

    @torch.no_grad()
    def set_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set scale (float, positive) and zero point (integers), ``(1,)`` or ``(channels,)``."""
        log_scale = scale.detach().reshape(-1).float().clamp(min=_FLOAT.tiny).log()
        if log_scale.shape != self.log_scale.shape:
            self.log_scale = nn.Parameter(log_scale, requires_grad=self.log_scale.requires_grad)
        else:
            self.log_scale.copy_(log_scale)
        self.zero_point = zero_point.detach().reshape(-1).to(self.log_scale.device, torch.int64)

    def initialise_from_observer(self) -> None:
        """Take over the observer's range as the starting scale and zero point."""
        self.set_qparams(*self.activation_post_process.calculate_qparams())

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Return the learned ``scale`` (float) and ``zero_point`` (int64); all that hosts ask for."""
        return self.scale.detach().clone(), self.zero_point.clone()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` quantized and dequantized, same shape and dtype."""
        if self.observing:
            self.activation_post_process(x)
            self.initialise_from_observer()
        if not self.quantizing or x.numel() == 0:
            return x
        hat = self.quantize_dequantize(x)
        if self.drop_probability and self.training:
            return torch.where(torch.rand_like(x) < self.drop_probability, x, hat)
        return hat

    def quantize_dequantize(self, x: Tensor) -> Tensor:
        """Round ``x`` to the grid, whatever the state of the flags; computed in float32."""
        hat = round_to_grid(
            x.float(),
            self.scale.float(),
            self.zero_point.float(),
            self.quant_min,
            self.quant_max,
            self.ch_axis if self.per_channel else None,
        )
        return hat.to(x.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Scale and zero point take the shapes of what is loaded."""
        loaded = state_dict.get(prefix + "log_scale")
        if isinstance(loaded, Tensor) and loaded.shape != self.log_scale.shape:
            empty = torch.empty_like(loaded, device=self.log_scale.device)
            self.log_scale = nn.Parameter(empty, requires_grad=self.log_scale.requires_grad)
            self.zero_point = torch.zeros(loaded.shape, dtype=torch.int64, device=self.log_scale.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.observing = bool(self.observer_enabled[0])
        self.quantizing = bool(self.fake_quant_enabled[0])

    def extra_repr(self) -> str:
        """Say the grid and the scheme."""
        return f"num_bits={self.num_bits}, [{self.quant_min}, {self.quant_max}], {self.qscheme}"


class PerChannelLearnableFakeQuantize(LearnableFakeQuantize):
    """`LearnableFakeQuantize` with a scale per channel; the name is what torchao looks for."""

    def __init__(self, observer: Any = PerChannelMinMaxObserver, **kwargs: Any) -> None:
        kwargs.setdefault("dtype", torch.qint8)
        kwargs.setdefault("qscheme", torch.per_channel_symmetric)
        super().__init__(observer=observer, **kwargs)
