"""NNCF's quantizers as what the across-block calibration optimises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nncf.torch.quantization.layers import BaseQuantizer
from torch import Tensor, nn

from repapq_plugin.config import LearningRates
from repapq_plugin.hosts.nncf.quantizers import learnable, step_of
from repapq_plugin.method.learners import weight_groups
from repapq_plugin.quantizers.layers import ChannelAffine


@dataclass(frozen=True)
class WeightLearner:
    """A layer whose weight NNCF quantizes: weight, bias, scales and, where there is one, QPR's affine layer learn.

    Args:
        module: The layer.
        quantizer: NNCF's quantizer of its weight.
        affine: QPR's affine layer behind it.
    """

    module: nn.Module
    quantizer: BaseQuantizer
    affine: ChannelAffine | None

    def parameter_groups(self, magnitude: float, rates: LearningRates) -> list[dict[str, Any]]:
        """See `repapq_plugin.method.learners.Learner`."""
        weight, bias = _parameter(self.module, "weight"), _parameter(self.module, "bias")
        groups = weight_groups(weight, bias, float(step_of(self.quantizer).mean()), magnitude, rates)
        groups += range_groups(self.quantizer, rates)
        if self.affine is not None:
            rate = rates.affine / self.quantizer.level_high
            groups.append({"params": [self.affine.gamma], "lr": rate})
            groups.append({"params": [self.affine.beta], "lr": rate * magnitude})
        return groups

    def offsets(self) -> list[Tensor]:
        """See `repapq_plugin.method.learners.Learner`."""
        beta = None if self.affine is None else self.affine.beta
        return [offset for offset in (_parameter(self.module, "bias"), beta) if offset is not None]

    def state(self) -> dict[str, Tensor]:
        """See `repapq_plugin.method.learners.Learner`."""
        found: dict[str, Tensor | None] = {
            "weight": _parameter(self.module, "weight"),
            "bias": _parameter(self.module, "bias"),
            **learnable(self.quantizer),
        }
        if self.affine is not None:
            found |= {"gamma": self.affine.gamma, "beta": self.affine.beta}
        return {key: value.detach() for key, value in found.items() if value is not None}

    def set_quantizing(self, enabled: bool) -> None:
        """See `repapq_plugin.method.learners.Learner`."""
        self.quantizer.enabled.fill_(int(enabled))

    def set_dropping(self, enabled: bool) -> None:
        """Weights are never dropped."""


@dataclass(frozen=True)
class ActivationLearner:
    """A quantizer that NNCF placed on an activation: its range learns.

    Args:
        module: The quantizer.
    """

    module: BaseQuantizer

    def parameter_groups(self, magnitude: float, rates: LearningRates) -> list[dict[str, Any]]:
        """See `repapq_plugin.method.learners.Learner`."""
        return range_groups(self.module, rates)

    def offsets(self) -> list[Tensor]:
        """A quantizer adds nothing."""
        return []

    def state(self) -> dict[str, Tensor]:
        """See `repapq_plugin.method.learners.Learner`."""
        return {key: value.detach() for key, value in learnable(self.module).items()}

    def set_quantizing(self, enabled: bool) -> None:
        """See `repapq_plugin.method.learners.Learner`."""
        self.module.enabled.fill_(int(enabled))

    def set_dropping(self, enabled: bool) -> None:
        """NNCF's quantizers drop nothing; `calibrate` refuses a configuration that asks for it."""


def range_groups(quantizer: BaseQuantizer, rates: LearningRates) -> list[dict[str, Any]]:
    """Return the parameter groups of a quantizer whose length is stored as its logarithm."""
    parameters = learnable(quantizer)
    groups = [{"params": [parameters["length"]], "lr": rates.scale / quantizer.level_high}]
    if "input_low" in parameters:
        groups.append({"params": [parameters["input_low"]], "lr": rates.scale * float(step_of(quantizer).mean())})
    return groups


def _parameter(layer: nn.Module, name: str) -> Any:
    return getattr(layer, name)
