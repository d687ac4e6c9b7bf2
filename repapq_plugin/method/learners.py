"""What learns: a part of the quantized network with its parameters, whoever's quantizers it carries.

Calibration optimises learners and knows nothing else of a network's quantizers. `LayerLearner` is a layer with the
plugin's own; a host whose toolbox places quantizers of its own describes them by the same few methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from repapq_plugin.config import LearningRates
from repapq_plugin.quantizers.layers import QuantizedLayer
from repapq_plugin.quantizers.trace import hooked, unseen


class Learner(Protocol):
    """A part of the quantized network that learns."""

    @property
    def module(self) -> nn.Module:
        """The module whose output tells how large a step of a bias may be."""

    def parameter_groups(self, magnitude: float, rates: LearningRates) -> list[dict[str, Any]]:
        """Return Adam's parameter groups, each with its learning rate in real units.

        Args:
            magnitude: Mean absolute output of `module`.
            rates: The rates in steps of each grid.
        """

    def offsets(self) -> list[Tensor]:
        """Return the biases that `leave_ties` moves; the tensors themselves, no copies."""

    def state(self) -> dict[str, Tensor]:
        """Return all that learning may change; the tensors themselves, no copies."""

    def set_quantizing(self, enabled: bool) -> None:
        """Quantize, or hand values on as they are."""

    def set_dropping(self, enabled: bool) -> None:
        """Let activations stay unquantized at random, if that is configured (QDrop)."""


@dataclass(frozen=True)
class LayerLearner:
    """A layer with the plugin's own quantizers: weight, bias, scales and QPR's affine learn."""

    module: QuantizedLayer

    def parameter_groups(self, magnitude: float, rates: LearningRates) -> list[dict[str, Any]]:
        """See `Learner`."""
        layer, quantizer = self.module, self.module.weight_fake_quant
        step = float(quantizer.scale.detach().mean())
        groups = weight_groups(layer.weight, layer.bias, step, magnitude, rates)
        groups.append({"params": [quantizer.log_scale], "lr": rates.scale / quantizer.quant_max})
        if layer.affine is not None:
            rate = rates.affine / quantizer.quant_max
            groups.append({"params": [layer.affine.gamma], "lr": rate})
            groups.append({"params": [layer.affine.beta], "lr": rate * magnitude})
        of_input = layer.input_fake_quant
        groups.append({"params": [of_input.log_scale], "lr": rates.scale / of_input.quant_max})
        return groups

    def offsets(self) -> list[Tensor]:
        """None: runtimes agree with these quantizers on every network measured, and moving costs a little."""
        return []

    def state(self) -> dict[str, Tensor]:
        """See `Learner`."""
        return dict(self.module.state_dict())

    def set_quantizing(self, enabled: bool) -> None:
        """See `Learner`."""
        self.module.weight_fake_quant.enable_fake_quant(enabled)
        self.module.input_fake_quant.enable_fake_quant(enabled)

    def set_dropping(self, enabled: bool) -> None:
        """See `Learner`."""
        self.module.input_fake_quant.train(enabled)


def weight_groups(
    weight: Tensor, bias: Tensor | None, step: float, magnitude: float, rates: LearningRates
) -> list[dict[str, Any]]:
    """Return the parameter groups of a weight, float, whose grid has steps of ``step``, and of its bias."""
    groups: list[dict[str, Any]] = [{"params": [weight], "lr": rates.weight * step}]
    if bias is not None:
        relative_step = step / max(float(weight.detach().abs().mean()), step)
        groups.append({"params": [bias], "lr": rates.weight * relative_step * magnitude})
    return groups


def parameter_groups(
    learners: Mapping[str, Learner], magnitudes: Mapping[str, float], rates: LearningRates
) -> list[dict[str, Any]]:
    """Return Adam's parameter groups of all ``learners``; what several share learns once.

    Args:
        learners: What learns, by module path.
        magnitudes: Mean absolute output of each, by module path.
        rates: The rates in grid steps.
    """
    groups: list[dict[str, Any]] = []
    seen: set[int] = set()
    for name, learner in learners.items():
        for group in learner.parameter_groups(magnitudes[name], rates):
            own = [parameter for parameter in group["params"] if id(parameter) not in seen]
            seen.update(id(parameter) for parameter in own)
            if own:
                groups.append({**group, "params": own})
    return groups


@torch.no_grad()
def output_magnitudes(learners: Mapping[str, Learner], run: Callable[[], Any]) -> dict[str, float]:
    """Return the mean absolute output of each learner's module in one pass; 1 where it was not called."""
    found = dict.fromkeys(learners, 1.0)

    def recorder(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            with unseen():
                if isinstance(output, Tensor) and output.numel():
                    found[name] = float(output.abs().mean())

        return hook

    with hooked([learner.module.register_forward_hook(recorder(name)) for name, learner in learners.items()]):
        run()
    return found


TIE_MARGIN = 1e-4
"""Share of a bias by which it leaves the place where learning ended (our choice).

A channel that is constant over a plain background gives one value at thousands of places. Where both codes around it
cost the same, learning swings between them and comes to rest in the middle, to the last bit of float32; every runtime
then rounds all those places its own way. On the RepVGG at W4A4 one such channel of the stem, quantized by NNCF, parted
OpenVINO from torch on 9,875 of 10,000 images, 0.16 points apart; off the tie both score the same. The price: the
RepVGG-FCN at W8A8 falls from 58.8 to 58.6 mIoU (float 58.67).
"""


@torch.no_grad()
def leave_ties(learners: Mapping[str, Learner]) -> None:
    """Move the `Learner.offsets` by `TIE_MARGIN` of themselves, in place; shared ones once."""
    offsets = {id(offset): offset for learner in learners.values() for offset in learner.offsets()}
    for offset in offsets.values():
        offset.mul_(1 + TIE_MARGIN)


def snapshot(learners: Mapping[str, Learner]) -> dict[str, dict[str, Tensor]]:
    """Return copies of all that learning may change."""
    return {name: {key: value.clone() for key, value in learner.state().items()} for name, learner in learners.items()}


@torch.no_grad()
def restore(learners: Mapping[str, Learner], saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Bring back what `snapshot` returned."""
    for name, learner in learners.items():
        for key, value in learner.state().items():
            value.copy_(saved[name][key])
