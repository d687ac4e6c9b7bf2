"""What all observers share: the torch.ao surface, and the registry in which a configuration finds them by name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol, TypedDict, TypeVar, cast

import torch
from torch import Tensor
from torch.ao.quantization.observer import ObserverBase

from repapq_plugin.config import OBSERVER_NAMES, WEIGHT_OBSERVER_NAMES
from repapq_plugin.core.quant_primitives import choose_qparams
from repapq_plugin.errors import CalibrationError, ConfigError, HostError

SYMMETRIC_SCHEMES = (torch.per_tensor_symmetric, torch.per_channel_symmetric)
PER_TENSOR_SCHEMES = (torch.per_tensor_affine, torch.per_tensor_symmetric)
PER_CHANNEL_SCHEMES = (torch.per_channel_affine, torch.per_channel_symmetric)

OBSERVERS: dict[str, type[RangeObserver]] = {}
"""Observer classes by the name a configuration uses; per-channel ones as ``per_channel_<name>``."""

PER_CHANNEL = "per_channel_"
"""How the names of classes begin that give each channel a range of its own."""

_Class = TypeVar("_Class", bound="type[RangeObserver]")
_Made = TypeVar("_Made")


class _Named(Protocol):
    __name__: str


class RangeOptions(TypedDict, total=False):
    """What `RangeObserver` takes, all by keyword."""

    dtype: torch.dtype
    qscheme: torch.qscheme | None
    quant_min: int | None
    quant_max: int | None
    ch_axis: int
    is_dynamic: bool
    reduce_range: bool
    eps: float | None
    factory_kwargs: dict[str, object] | None


def register_observer(name: str) -> Callable[[_Class], _Class]:
    """Put an observer class into `OBSERVERS` under ``name``.

    A new observer is one file with one class. Choose the base by what it must remember: `RangeObserver`
    (smallest and largest value), `histogram.HistogramRangeObserver` (the distribution of everything seen)
    or `range_search.SearchedRangeObserver` (that, and a search by an error measure of yours). `observe`
    takes in a batch, `find_range` answers with ``(min_val, max_val)``; what the base does already need
    not be written again. This one widens the range by a tenth::

        @register_observer("roomy")
        class RoomyObserver(MinMaxObserver):
            def find_range(self):
                return 1.1 * self.min_val, 1.1 * self.max_val

    Then `LearnableFakeQuantize(observer=RoomyObserver)` and torch.ao's ``QConfig`` take the class as it is.
    So does ``RepAPQConfig(activation_observer="roomy")``, once the file is imported. A class with a range per
    channel is registered as ``per_channel_<name>``; ``weight_observer`` then takes ``<name>``.

    Args:
        name: What a configuration calls it.

    Returns:
        A decorator that hands the class back unchanged; a class of the same name is replaced.
    """

    def add(cls: _Class) -> _Class:
        OBSERVERS[name] = cls
        names = WEIGHT_OBSERVER_NAMES if name.startswith(PER_CHANNEL) else OBSERVER_NAMES
        if name.removeprefix(PER_CHANNEL) not in names:
            names.append(name.removeprefix(PER_CHANNEL))
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


def named_factory(factory: object, kind: type[_Made]) -> Callable[..., _Made]:
    """Give what ``with_args`` of ``kind`` returned a name: pt2e reads it, and then gets as far as `refuse_pt2e`."""
    cast(_Named, factory).__name__ = kind.__name__
    return cast("Callable[..., _Made]", factory)


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
        factory_kwargs: dict[str, object] | None = None,
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
    def with_args(cls, **kwargs: object) -> Callable[..., RangeObserver]:
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

    def apart(self) -> None:
        """From now on see only one rank's share of each batch; `settle` ends a batch."""

    def sizes(self) -> list[Tensor]:
        """Return what `settle` needs of each call since the last one: sizes of its samples, ``(samples,)``."""
        return []

    def settle(self, sizes: Sequence[Sequence[Tensor]]) -> None:
        """Take in what was seen since the last `settle`.

        Args:
            sizes: For each call, what `sizes` returned for it on each rank that made it.
        """

    def extremes(self) -> Tensor:
        """Return what is largest over all ranks, float64: negated smallest value, largest value; before any, -inf."""
        if self.min_val.numel() == 0:
            return torch.full((2,), -torch.inf, dtype=torch.float64, device=self.min_val.device)
        return torch.stack([-self.min_val.double(), self.max_val.double()])

    def set_extremes(self, values: Tensor) -> None:
        """Take in the largest of what `extremes` returned on any rank."""
        if bool(torch.isfinite(values[:2]).all()):
            self.min_val, self.max_val = -values[0].float(), values[1].float()

    def totals(self) -> list[Tensor]:
        """Return what is added up over all ranks, once extremes are set; changed in place."""
        return []

    def calculate_qparams(self, **_: object) -> tuple[Tensor, Tensor]:
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

    def _load_from_state_dict(self, state_dict: Mapping[str, object], prefix: str, *args: object) -> None:
        """Buffers take the shapes of what is loaded: a fresh observer does not know them yet."""
        for name, buffer in list(self._buffers.items()):
            loaded = state_dict.get(prefix + name)
            if buffer is not None and isinstance(loaded, Tensor) and loaded.shape != buffer.shape:
                self._buffers[name] = torch.empty_like(loaded, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Say the grid and the range found so far."""
        return f"[{self.quant_min}, {self.quant_max}], min_val={self.min_val}, max_val={self.max_val}"
