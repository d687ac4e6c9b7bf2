"""MAE ranges for plain `nncf.quantize`: a reducer and two aggregators under NNCF's own names for such things."""

from __future__ import annotations

from abc import abstractmethod
from enum import Enum

import torch
from nncf.quantization.range_estimator import RangeEstimatorParameters, StatisticsCollectorParameters
from nncf.tensor import Tensor

from repapq_plugin.errors import HostError
from repapq_plugin.hosts.nncf._compat import AggregatorBase, TensorReducerBase, collectors
from repapq_plugin.observers import MAEObserver


class WholeTensor(Enum):
    """Name of the statistic under which NNCF hands over tensors as they are."""

    RAW = "repapq_raw"


class MAERange(Enum):
    """Names of the ends of the range of least mean absolute error."""

    MIN = "repapq_mae_min"
    MAX = "repapq_mae_max"
    SYMMETRIC_MIN = "repapq_mae_symmetric_min"
    SYMMETRIC_MAX = "repapq_mae_symmetric_max"


def mae_range_estimator(symmetric: bool = True) -> RangeEstimatorParameters:
    """Return what ``AdvancedQuantizationParameters(activations_range_estimator_params=...)`` takes.

    The 8-bit range that minimises ``E |x - x_hat|`` over all samples that NNCF collects. For activations: on weights,
    NNCF asks per channel, which is refused.

    Args:
        symmetric: Whether signed activations are quantized symmetrically, as by NNCF's ``PERFORMANCE`` preset, its
            default; its ``MIXED`` preset does not.
    """
    low, high = (MAERange.SYMMETRIC_MIN, MAERange.SYMMETRIC_MAX) if symmetric else (MAERange.MIN, MAERange.MAX)
    return RangeEstimatorParameters(
        min=StatisticsCollectorParameters(WholeTensor.RAW, low),
        max=StatisticsCollectorParameters(WholeTensor.RAW, high),
    )


class _Whole(TensorReducerBase):  # type: ignore[misc]
    """Hands tensors on as they are."""

    def _reduce_out_of_place(self, x: list[Tensor]) -> list[Tensor]:
        kept = () if self._axes is None else set(range(x[0].ndim)) - set(self._axes)
        if any(x[0].shape[axis] > 1 for axis in kept):
            raise HostError(
                f"NNCF asks for a range per channel of a tensor {tuple(x[0].shape)}, as it does for weights and in "
                "front of depthwise convolutions; MAE ranges are per tensor. Use mae_range_estimator for activations "
                "only, and repapq_plugin.hosts.nncf.quantize for networks with depthwise convolutions."
            )
        return x


class _MAEAggregator(AggregatorBase):  # type: ignore[misc]
    """One end of the MAE range of everything that was registered, in memory that does not grow."""

    symmetric = False

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._low = float("inf")
        self._observers = {
            "unsigned": MAEObserver(dtype=torch.quint8),
            "signed": MAEObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric),
        }
        if not self.symmetric:
            self._observers.pop("signed")

    def _register_reduced_input_impl(self, x: Tensor) -> None:
        self._low = min(self._low, float(x.data.min()))
        for observer in self._observers.values():
            observer(x.data)

    def _aggregate_impl(self) -> Tensor:
        signed = self.symmetric and self._low < 0
        low, high = self._observers["signed" if signed else "unsigned"].find_range()
        return Tensor(self.end(low, high))

    @abstractmethod
    def end(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """Return the end that is asked for."""


class _Low(_MAEAggregator):
    def end(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return low


class _High(_MAEAggregator):
    def end(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return high


class _SymmetricLow(_Low):
    symmetric = True


class _SymmetricHigh(_High):
    symmetric = True


def register() -> None:
    """Teach NNCF the names; again is harmless."""
    collectors.REDUCERS_MAP[WholeTensor.RAW] = _Whole
    collectors.AGGREGATORS_MAP.update(
        {
            MAERange.MIN: _Low,
            MAERange.MAX: _High,
            MAERange.SYMMETRIC_MIN: _SymmetricLow,
            MAERange.SYMMETRIC_MAX: _SymmetricHigh,
        }
    )
