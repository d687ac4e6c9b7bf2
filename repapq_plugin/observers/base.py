"""What all observers share: the torch.ao surface, the registry, and the per-tensor histogram."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.ao.quantization.observer import ObserverBase

from repapq_plugin.core.quant_primitives import choose_qparams
from repapq_plugin.errors import CalibrationError, ConfigError, HostError

SYMMETRIC_SCHEMES = (torch.per_tensor_symmetric, torch.per_channel_symmetric)
PER_TENSOR_SCHEMES = (torch.per_tensor_affine, torch.per_tensor_symmetric)
PER_CHANNEL_SCHEMES = (torch.per_channel_affine, torch.per_channel_symmetric)

MIN_EXPONENT = -126
"""A histogram reaches at least to two to this power, so that one of zeros alone has a width."""

OBSERVERS: dict[str, type[RangeObserver]] = {}
"""Observer classes by the name a configuration uses; per-channel ones as ``per_channel_<name>``."""

_Class = TypeVar("_Class", bound="type[RangeObserver]")


def register_observer(name: str) -> Callable[[_Class], _Class]:
    """Make an observer class available to configurations under ``name``."""

    def add(cls: _Class) -> _Class:
        OBSERVERS[name] = cls
        return cls

    return add


def refuse_pt2e(kind: type, dtype: torch.dtype) -> None:
    """Refuse to be made by torchao's pt2e, which silently ignores what does not stand on its own bases.

    Raises:
        HostError: ``dtype`` is one by which pt2e, and not torch.ao, names an integer type.
    """
    if dtype in (torch.uint8, torch.int8):
        raise HostError(
            f"{kind.__name__} got dtype={dtype}, which is how torchao's pt2e says it; there name "
            f"repapq_plugin.hosts.pt2e.{kind.__name__}. torch.ao says torch.quint8 and torch.qint8."
        )


def named_factory(factory: Any, kind: type) -> Any:
    """Give what ``with_args`` returns a name: pt2e reads it, and then gets as far as `refuse_pt2e`."""
    factory.__name__ = kind.__name__
    return factory


class RangeObserver(ObserverBase):
    """Watches tensors and answers with a range, and through it with ``(scale, zero_point)``.

    Args:
        dtype: Storage type that a host asks for; does not limit ``quant_min`` and ``quant_max``.
        qscheme: A torch scheme, affine or symmetric, per tensor or per channel as the class is;
            default: affine.
        quant_min: Smallest integer of the grid; default: that of ``dtype``.
        quant_max: Largest integer of the grid; default: that of ``dtype``.
        ch_axis: Axis of the channels, for per-channel schemes.
        is_dynamic: Must be false; ranges here are static.
        reduce_range: Must be false; a smaller grid is given by ``quant_min`` and ``quant_max``.
        eps: Accepted for torch.ao's sake, unused: scales are floored by ``choose_qparams``.
        factory_kwargs: Accepted for torch.ao's sake (device and dtype of buffers), unused.

    Raises:
        ConfigError: A value is not allowed, or the scheme is not one for this class.
        HostError: Made by torchao's pt2e; the message names the class to take there.
    """

    per_channel: ClassVar[bool] = False
    """Whether every slice along ``ch_axis`` gets a range of its own."""

    min_val: Tensor
    max_val: Tensor

    def __init__(
        self,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme | None = None,
        quant_min: int | None = None,
        quant_max: int | None = None,
        ch_axis: int = 0,
        is_dynamic: bool = False,
        reduce_range: bool = False,
        eps: float | None = None,
        factory_kwargs: dict[str, Any] | None = None,
    ) -> None:
        refuse_pt2e(type(self), dtype)
        super().__init__(dtype=dtype, is_dynamic=is_dynamic)
        if is_dynamic:
            raise ConfigError("is_dynamic=True is not allowed; these observers find static ranges.")
        if reduce_range:
            raise ConfigError("reduce_range=True is not allowed; give the smaller grid as quant_min and quant_max.")
        allowed = PER_CHANNEL_SCHEMES if self.per_channel else PER_TENSOR_SCHEMES
        self.qscheme = allowed[0] if qscheme is None else qscheme
        if self.qscheme not in allowed:
            raise ConfigError(
                f"qscheme={qscheme} is not allowed for {type(self).__name__}; choose {allowed[0]} or {allowed[1]}."
            )
        signed = dtype is torch.qint8
        self.quant_min: int = quant_min if quant_min is not None else (-128 if signed else 0)
        self.quant_max: int = quant_max if quant_max is not None else (127 if signed else 255)
        if not self.quant_min <= 0 <= self.quant_max or self.quant_min == self.quant_max:
            raise ConfigError(
                f"quant_min={self.quant_min}, quant_max={self.quant_max} is not allowed; choose a grid that holds 0 "
                "and more than one integer."
            )
        self.ch_axis = ch_axis
        self.register_buffer("min_val", torch.tensor([]))
        self.register_buffer("max_val", torch.tensor([]))

    @classmethod
    def with_args(cls, **kwargs: Any) -> Any:
        """Return a factory of this class with some arguments set, as torch.ao's observers do."""
        return named_factory(super().with_args(**kwargs), cls)

    @property
    def symmetric(self) -> bool:
        """Whether the grid is centred on zero."""
        return self.qscheme in SYMMETRIC_SCHEMES

    @abstractmethod
    def observe(self, x: Tensor) -> None:
        """Take in one batch ``x`` (any shape, floating, finite and not empty)."""

    def find_range(self) -> tuple[Tensor, Tensor]:
        """Return ``(min_val, max_val)``, scalars or of shape ``(channels,)``."""
        return self.min_val, self.max_val

    def forward(self, x: Tensor) -> Tensor:
        """Observe ``x`` and hand it on unchanged.

        Raises:
            CalibrationError: ``x`` holds NaN or Inf.
        """
        if x.numel():
            detached = x.detach()
            if not torch.isfinite(detached).all():
                bad = int((~torch.isfinite(detached)).sum())
                raise CalibrationError(f"{bad} of {x.numel()} observed values are NaN or Inf.")
            self.observe(detached)
        return x

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Return ``scale`` (float32) and ``zero_point`` (int64); scale 1 before any observation."""
        if self.min_val.numel() == 0:
            unset = torch.ones(1, device=self.min_val.device)
            return unset, torch.zeros_like(unset, dtype=torch.int64)
        low, high = self.find_range()
        scale, zero_point = choose_qparams(low, high, self.quant_min, self.quant_max, symmetric=self.symmetric)
        return scale.reshape(-1), zero_point.reshape(-1)

    def reset_min_max_vals(self) -> None:
        """Forget everything observed."""
        self.min_val = torch.tensor([], device=self.min_val.device)
        self.max_val = torch.tensor([], device=self.max_val.device)

    def _widen(self, low: Tensor, high: Tensor) -> None:
        if self.min_val.numel() == 0:
            self.min_val, self.max_val = low.clone(), high.clone()
        else:
            self.min_val = torch.minimum(self.min_val, low)
            self.max_val = torch.maximum(self.max_val, high)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Buffers take the shapes of what is loaded: a fresh observer does not know them yet."""
        for name, buffer in list(self._buffers.items()):
            loaded = state_dict.get(prefix + name)
            if buffer is not None and isinstance(loaded, Tensor) and loaded.shape != buffer.shape:
                self._buffers[name] = torch.empty_like(loaded, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Say the grid and the range found so far."""
        return f"[{self.quant_min}, {self.quant_max}], min_val={self.min_val}, max_val={self.max_val}"


class HistogramRangeObserver(RangeObserver):
    """Keeps a histogram of everything seen, in memory that does not grow with the number of batches.

    The histogram covers ``[-R, R)`` where ``R``, a power of two, doubles when a larger value arrives;
    two neighbouring bins then become one, so counts stay exact, and the same in whatever order the
    batches come. Each bin also sums its values: its mean stands for it, and a bin of exact zeros
    (behind a ReLU) keeps an exact representative.

    Args:
        bins: Number of bins over ``[-R, R]``, a multiple of 4.
        **kwargs: See `RangeObserver`.
    """

    counts: Tensor
    sums: Tensor
    radius: Tensor

    def __init__(self, bins: int = 8192, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if bins < 64 or bins % 4:
            raise ConfigError(f"bins={bins} is not allowed; choose a multiple of 4, at least 64.")
        self.bins = bins
        self.register_buffer("counts", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("radius", torch.zeros((), dtype=torch.float64))

    def observe(self, x: Tensor) -> None:
        """Add the values of ``x`` to the histogram."""
        low, high = torch.aminmax(x)
        self._widen(low.float(), high.float())
        reach = float(torch.maximum(-low, high))
        if float(self.radius) == 0:
            self.radius.fill_(2.0 ** max(math.frexp(reach)[1], MIN_EXPONENT))
        while reach >= float(self.radius):
            self._double()
        flat = x.reshape(-1).double()
        index = torch.floor(flat / self.radius * (self.bins / 2)).long() + self.bins // 2
        self.counts += torch.bincount(index, minlength=self.bins).to(self.counts)
        self.sums += torch.bincount(index, weights=flat, minlength=self.bins).to(self.sums)

    def _double(self) -> None:
        quarter = self.bins // 4
        for buffer in (self.counts, self.sums):
            halved = buffer.reshape(-1, 2).sum(1)
            buffer.zero_()
            buffer[quarter : quarter + halved.numel()] = halved
        self.radius *= 2

    def reset_min_max_vals(self) -> None:
        """Forget everything observed."""
        super().reset_min_max_vals()
        for buffer in (self.counts, self.sums, self.radius):
            buffer.zero_()

    def points(self) -> tuple[Tensor, Tensor]:
        """Return representatives and counts of the filled bins, float64, ``(filled,)`` each."""
        filled = self.counts > 0
        counts = self.counts[filled]
        return self.sums[filled] / counts, counts


class SearchedRangeObserver(HistogramRangeObserver):
    """Searches the range whose quantization error is smallest on the histogram.

    Upper and lower bound move in turn, first over fractions of the observed bounds, then twice over
    fractions of twice the value found: so the search stays fine behind an outlier of any size. What was
    found is always tried again, and the full min-max range first of all, so the result is never worse
    than it under its own measure.

    Args:
        candidates: Number of evenly spaced fractions tried for a bound in one pass; half as many more
            are spaced by a ratio, down to a ten-thousandth.
        **kwargs: See `HistogramRangeObserver`.
    """

    power: float
    """1 for the mean absolute, 2 for the mean squared error."""

    def __init__(self, candidates: int = 100, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.candidates = candidates

    def range_error(self, low: Tensor, high: Tensor) -> Tensor:
        """Return the mean of ``|x - x_hat| ** power`` for each of ``n`` ranges, float64 ``(n,)``."""
        values, counts = self.points()
        # In float32, as the answer will be: a zero point that rounds the other way is another grid.
        scale, zero_point = choose_qparams(
            low.float(), high.float(), self.quant_min, self.quant_max, symmetric=self.symmetric
        )
        scale, zero = scale.double()[:, None], zero_point.double()[:, None]
        codes = torch.clamp(torch.round(values / scale) + zero, self.quant_min, self.quant_max)
        error = ((codes - zero) * scale - values).abs() ** self.power
        return (error * counts).sum(1) / counts.sum()

    def find_range(self) -> tuple[Tensor, Tensor]:
        """Return the searched range, float32 scalars."""
        low, high = self.min_val.double().clamp(max=0), self.max_val.double().clamp(min=0)
        if self.symmetric:
            low, high = -torch.maximum(-low, high), torch.maximum(-low, high)
        full_low, full_high = low, high
        for spread in (1.0, 2.0, 2.0):
            highs = self._tried(high, full_high, spread)
            if self.symmetric:
                high = highs[self.range_error(-highs, highs).argmin()]
                low = -high
                continue
            high = highs[self.range_error(low.expand_as(highs), highs).argmin()]
            lows = self._tried(low, full_low, spread)
            low = lows[self.range_error(lows, high.expand_as(lows)).argmin()]
        return low.float(), high.float()

    def _tried(self, bound: Tensor, full: Tensor, spread: float) -> Tensor:
        """Return ``bound`` itself and fractions of ``spread`` times it, none beyond ``full``."""
        if full == 0:
            return bound[None]
        even = torch.linspace(1.0, 1.0 / self.candidates, self.candidates)
        fractions = torch.cat([even, torch.logspace(0, -4, self.candidates // 2)]).to(bound)
        magnitudes = (bound.abs() * spread * fractions).clamp(max=full.abs())
        return torch.cat([bound[None], magnitudes * torch.sign(full)])
