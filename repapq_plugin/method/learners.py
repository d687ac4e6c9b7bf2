"""What learns: a part of the quantized network with its parameters, whoever's quantizers it carries.

Calibration optimises learners and knows nothing else of a network's quantizers. `LayerLearner` is a layer with the
plugin's own; a host whose toolbox places quantizers of its own describes them by the same few methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from repapq_plugin.config import LearningRates
from repapq_plugin.core import ranks
from repapq_plugin.core.hooks import Hooks, unseen
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize
from repapq_plugin.quantizers.layers import ChannelAffine, QuantizedLayer


@dataclass(frozen=True)
class Learnable:
    """A parameter that learns, and Adam's starting rate for it in the parameter's own unit."""

    parameter: nn.Parameter
    rate: float


class Learner(Protocol):
    """A part of the quantized network that learns."""

    @property
    def module(self) -> nn.Module:
        """The module whose output tells how large a step of a bias may be."""

    def learnables(self, magnitude: float, rates: LearningRates) -> list[Learnable]:
        """Return what learns, each with its rate in real units.

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

    def learnables(self, magnitude: float, rates: LearningRates) -> list[Learnable]:
        """See `Learner`."""
        layer, quantizer, of_input = self.module, self.module.weight_fake_quant, self.module.input_fake_quant
        step = float(quantizer.scale.detach().mean())
        return [
            *learnables_of_layer(layer, step, magnitude, rates),
            Learnable(quantizer.log_scale, rates.scale / quantizer.quant_max),
            *learnables_of_affine(layer.affine, rates.affine / quantizer.quant_max, magnitude),
            Learnable(of_input.log_scale, rates.scale / of_input.reach),
        ]

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


@dataclass(frozen=True)
class SkipLearner:
    """The quantizer of what is added to a layer's output, or of an output, if it is no layer's own: its scale learns.

    Args:
        module: What adds, or gives the output.
        quantizer: The quantizer.
    """

    module: nn.Module
    quantizer: LearnableFakeQuantize

    def learnables(self, magnitude: float, rates: LearningRates) -> list[Learnable]:
        """See `Learner`."""
        return [Learnable(self.quantizer.log_scale, rates.scale / self.quantizer.reach)]

    def offsets(self) -> list[Tensor]:
        """None."""
        return []

    def state(self) -> dict[str, Tensor]:
        """See `Learner`."""
        return dict(self.quantizer.state_dict())

    def set_quantizing(self, enabled: bool) -> None:
        """See `Learner`."""
        self.quantizer.enable_fake_quant(enabled)

    def set_dropping(self, enabled: bool) -> None:
        """See `Learner`."""
        self.quantizer.train(enabled)


def learnables_of_layer(layer: nn.Module, step: float, magnitude: float, rates: LearningRates) -> list[Learnable]:
    """Return weight and bias of a layer whose weight grid has steps of ``step`` on average."""
    weight, bias = cast(nn.Parameter, layer.weight), cast("nn.Parameter | None", layer.bias)
    found = [Learnable(weight, rates.weight * step)]
    if bias is not None:
        relative_step = step / max(float(weight.detach().abs().mean()), step)
        found.append(Learnable(bias, rates.weight * relative_step * magnitude))
    return found


def learnables_of_affine(affine: ChannelAffine | None, rate: float, magnitude: float) -> list[Learnable]:
    """Return gamma and beta of QPR's affine layer, if there is one."""
    if affine is None:
        return []
    return [Learnable(affine.gamma, rate), Learnable(affine.beta, rate * magnitude)]


def parameter_groups(
    learners: Mapping[str, Learner], magnitudes: Mapping[str, float], rates: LearningRates
) -> list[dict[str, object]]:
    """Return Adam's parameter groups of all ``learners``, one for each rate; what several share learns once.

    Args:
        learners: What learns, by module path.
        magnitudes: Mean absolute output of each, by module path.
        rates: The rates in grid steps.
    """
    found: dict[nn.Parameter, float] = {}
    for name, learner in learners.items():
        for learnable in learner.learnables(magnitudes[name], rates):
            found.setdefault(learnable.parameter, learnable.rate)
    by_rate: dict[float, list[nn.Parameter]] = {}
    for parameter, rate in found.items():
        by_rate.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in by_rate.items()]


@torch.no_grad()
def output_magnitudes(learners: Mapping[str, Learner], run: Callable[[], object] | None) -> dict[str, float]:
    """Return the mean absolute output of each learner's module in one pass; 1 where it was not called.

    Args:
        learners: By module path.
        run: Makes the pass; with several ranks on this one's part of a batch, ``None`` where it has no part.
    """
    shares = ranks.collect(lambda: _magnitudes(learners, run))
    if len(shares) == 1:
        return dict.fromkeys(learners, 1.0) | {name: mean for name, (mean, _) in shares[0].items()}
    found = dict.fromkeys(learners, 1.0)
    for name in learners:
        parts = [share[name] for share in shares if name in share]
        if parts:
            found[name] = sum(mean * count for mean, count in parts) / sum(count for _, count in parts)
    return found


def _magnitudes(learners: Mapping[str, Learner], run: Callable[[], object] | None) -> dict[str, tuple[float, int]]:
    """Return the mean absolute output of each learner's module that is called, and of how many values it is that."""
    found: dict[str, tuple[float, int]] = {}

    def recorder(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: object, output: object) -> None:
            with unseen():
                if isinstance(output, Tensor) and output.numel():
                    found[name] = float(output.abs().mean()), output.numel()

        return hook

    with Hooks() as hooks:
        for name, learner in learners.items():
            hooks.after(learner.module, recorder(name))
        if run is not None:
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


def state_of(learners: Mapping[str, Learner]) -> dict[str, Tensor]:
    """Return all that learning may change, in one dictionary; the tensors themselves, no copies."""
    return {f"{name}/{key}": value for name, learner in learners.items() for key, value in learner.state().items()}


@torch.no_grad()
def load_state(learners: Mapping[str, Learner], saved: Mapping[str, Tensor]) -> None:
    """Bring back what `state_of` returned.

    Raises:
        KeyError: Another part of a network was saved.
    """
    for key, value in state_of(learners).items():
        value.copy_(saved[key])
