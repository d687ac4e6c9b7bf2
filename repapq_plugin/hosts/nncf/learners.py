"""NNCF's quantizers as what the across-block calibration optimises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from repapq_plugin.config import LearningRates
from repapq_plugin.hosts.nncf._compat import BaseQuantizer
from repapq_plugin.hosts.nncf.quantizers import learnable, step_of
from repapq_plugin.method.learners import Learnable, learnables_of_affine, learnables_of_layer
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

    def learnables(self, magnitude: float, rates: LearningRates) -> list[Learnable]:
        """See `repapq_plugin.method.learners.Learner`."""
        step = float(step_of(self.quantizer).mean())
        return [
            *learnables_of_layer(self.module, step, magnitude, rates),
            *learnables_of_range(self.quantizer, rates),
            *learnables_of_affine(self.affine, rates.affine / self.quantizer.level_high, magnitude),
        ]

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

    def learnables(self, magnitude: float, rates: LearningRates) -> list[Learnable]:
        """See `repapq_plugin.method.learners.Learner`."""
        return learnables_of_range(self.module, rates)

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
        """NNCF's quantizers drop nothing; `NNCFBackend` refuses a configuration that asks for it."""


def learnables_of_range(quantizer: BaseQuantizer, rates: LearningRates) -> list[Learnable]:
    """Return what learns of a quantizer whose length is stored as its logarithm."""
    parameters = learnable(quantizer)
    found = [Learnable(parameters["length"], rates.scale / quantizer.level_high)]
    if "input_low" in parameters:
        found.append(Learnable(parameters["input_low"], rates.scale * float(step_of(quantizer).mean())))
    return found


def _parameter(layer: nn.Module, name: str) -> nn.Parameter | None:
    return cast("nn.Parameter | None", getattr(layer, name))
