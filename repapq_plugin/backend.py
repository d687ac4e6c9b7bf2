"""`Backend`: how a network carries quantizers. The one job runs on any; each host has its own.

`OwnBackend` carries the plugin's quantizers and serves any `torch.nn.Module`. A host subclasses `Backend` where it
places quantizers of its own (NNCF), or `OwnBackend` where it takes over what was calibrated (torch.ao, pt2e).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from torch import Tensor, nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.copies import plain_copy
from repapq_plugin.core.fingerprints import Fingerprint, fingerprint
from repapq_plugin.core.running import Batch, ForwardFn
from repapq_plugin.method.learners import LayerLearner, Learner, SkipLearner
from repapq_plugin.method.qpr import attach_affine, fold_affine, round_bias
from repapq_plugin.method.sites import ActivationSite, Quantizer, Sites, WeightSite
from repapq_plugin.observers import RangeObserver
from repapq_plugin.policy import observer_class
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize
from repapq_plugin.quantizers.layers import OUTPUT, QuantizedLayer, float_layer, weight_of
from repapq_plugin.quantizers.outputs import find_outputs, insert_outputs, remove_outputs
from repapq_plugin.quantizers.plan import LayerPlan, OutputPlan, SkipPlan, insert_quantizers
from repapq_plugin.quantizers.skips import SKIPS, find_skips, insert_skips, remove_skips
from repapq_plugin.quantizers.trace import Trace
from repapq_plugin.result import Calibrated, CalibrationResult

PHASES = ("merge", "plan", "condition", "place", "find_ranges", "learn", "fold")
"""What a job does, in order; each is a method of `repapq_plugin.job.Job`."""

R = TypeVar("R", covariant=True)


@dataclass(frozen=True)
class Placing:
    """What a backend is given to place quantizers.

    Args:
        teacher: The merged float network; not to be changed.
        trace: What a forward pass of it showed.
        plans: Bits of each layer that should be quantized, by module path in call order.
        batches: Calibration batches.
        forward: Runs a network like the teacher on a batch.
        config: The configuration.
    """

    teacher: nn.Module
    trace: Trace
    plans: Mapping[str, LayerPlan]
    batches: Sequence[Batch]
    forward: ForwardFn
    config: RepAPQConfig


class Backend(ABC, Generic[R]):
    """Carries the quantizers of one calibration; made for one job and used up by it.

    A job calls `check`, `join` and `place`, reads `sites`, `plans` and `learners`, and ends with `fold` and `deliver`.
    ``R`` is what the host's users get.
    """

    phases: Sequence[str] = PHASES
    """The phases that a job runs on this backend."""

    places_again: bool = True
    """Whether `place` can be called anew with fewer layers planned."""

    unplaced: str = "left float by the host"
    """Why a layer stays float that the plan wanted quantized and the host did not place."""

    packages: Sequence[str] = ()
    """Distributions of the host whose versions decide what comes out."""

    student: nn.Module
    """The network with quantizers, once it is placed; in evaluation mode."""

    def check(self, model: nn.Module, batches: Sequence[Batch], config: RepAPQConfig) -> None:
        """Refuse what the host cannot do, before any work is done.

        Raises:
            RepAPQError: The message says what to change.
        """

    def told(self) -> dict[str, str]:
        """Return what the host was told besides, by name: where it differs, a calibration cannot be resumed."""
        return {}

    def fingerprint(self, model: nn.Module, batches: Sequence[Batch], config: RepAPQConfig) -> Fingerprint:
        """Return what a calibration on this backend depends on."""
        kind = type(self)
        told = {"the backend": f"{kind.__module__}.{kind.__qualname__}", **self.told()}
        return fingerprint(model, batches, config, told, self.packages)

    def join(self, teacher: nn.Module, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Return the batches that are calibrated on."""
        return batches

    @abstractmethod
    def place(self, task: Placing) -> None:
        """Make `student`: a copy of the float network that carries quantizers, ranges not yet found."""

    @property
    @abstractmethod
    def sites(self) -> Sites:
        """Where `student` is quantized."""

    @property
    @abstractmethod
    def plans(self) -> dict[str, LayerPlan]:
        """How each layer of `student` is really quantized, by module path."""

    @property
    def skips(self) -> dict[str, SkipPlan]:
        """How what is added to layers' outputs is quantized; nothing, unless a backend places such quantizers."""
        return {}

    @property
    def outputs(self) -> dict[str, OutputPlan]:
        """How outputs are quantized that not only quantized layers read; nothing, unless a backend does that."""
        return {}

    @abstractmethod
    def attach_affine(self) -> None:
        """Put QPR's affine layer, an identity, behind each layer that can take it in again."""

    @abstractmethod
    def learners(self) -> dict[str, Learner]:
        """Return all that learns, by the module path where it does."""

    @contextmanager
    def learning(self, names: Sequence[str]) -> Iterator[None]:
        """Bring `student` into the form in which it learns, for the time of a ``with`` block.

        Args:
            names: Module paths that will be run alone or answer from a cache.
        """
        yield

    def run_alone(self, name: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run one module of `student` on what each call is given; the same as inside the whole network."""
        module = self.student.get_submodule(name)
        return [module(x) for x in inputs]

    @abstractmethod
    def fold(self, teacher: nn.Module, left_float: Mapping[str, str]) -> None:
        """End the calibration: fold every affine layer and leave `student` as it is delivered.

        Args:
            teacher: The merged float network.
            left_float: Layers that could not be calibrated, with the reason.
        """

    @abstractmethod
    def deliver(self, calibrated: Calibrated, batches: Sequence[Batch]) -> R:
        """Return what the host's users get.

        Args:
            calibrated: `student` and the record of its calibration.
            batches: Calibration batches.
        """


class OwnQuantizer(Quantizer):
    """The plugin's fake quantizer as a `Quantizer`."""

    def __init__(self, fake_quantize: LearnableFakeQuantize) -> None:
        self.fake_quantize = fake_quantize

    @property
    def module(self) -> nn.Module:
        """See `Quantizer`."""
        return self.fake_quantize

    @property
    def bounds(self) -> tuple[int, int]:
        """See `Quantizer`."""
        return self.fake_quantize.quant_min, self.fake_quantize.quant_max

    @property
    def ch_axis(self) -> int | None:
        """See `Quantizer`."""
        return self.fake_quantize.ch_axis if self.fake_quantize.per_channel else None

    @property
    def power_of_two(self) -> bool:
        """See `Quantizer`."""
        return self.fake_quantize.power_of_two

    def observer(self, name: str, **arguments: float) -> RangeObserver:
        """See `Quantizer`."""
        grid = self.fake_quantize
        observer = observer_class(name, per_channel=grid.per_channel)(
            dtype=grid.dtype,
            qscheme=grid.qscheme,
            quant_min=grid.quant_min,
            quant_max=grid.quant_max,
            ch_axis=grid.ch_axis,
            **arguments,
        )
        return observer.to(grid.log_scale.device)

    def qparams(self) -> tuple[Tensor, Tensor]:
        """See `Quantizer`."""
        return self.fake_quantize.calculate_qparams()

    def set_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        """See `Quantizer`."""
        self.fake_quantize.set_qparams(scale, zero_point)

    @property
    def quantizing(self) -> bool:
        """See `Quantizer`."""
        return self.fake_quantize.quantizing

    @quantizing.setter
    def quantizing(self, enabled: bool) -> None:
        self.fake_quantize.enable_fake_quant(enabled)


class PlainBackend(Backend[R]):
    """Carries the plugin's own quantizers: each layer plays the role of a `QuantizedLayer`."""

    rounds_outputs: bool = True
    """Whether outputs can be quantized that not only quantized layers read."""

    def place(self, task: Placing) -> None:
        """See `Backend`."""
        self.student = plain_copy(task.teacher)
        for parameter in self.student.parameters():
            parameter.requires_grad_(False)
        self._plans = dict(task.plans)
        self._target = task.config.runs_on
        run = partial(task.forward, task.teacher, task.batches[0])
        self._skips = find_skips(task.teacher, run, task.plans) if self._target.quantizes_residuals else {}
        operators = self._target.rounded_outputs if self.rounds_outputs else ()
        self._outputs = find_outputs(task.teacher, run, task.plans, operators) if operators else {}
        self.layers: dict[str, QuantizedLayer] = insert_quantizers(self.student, task.plans, task.config)
        placed = (task.plans, self.layers, task.config)
        self._added = insert_skips(self.student, self._skips, *placed)
        self._rounded = insert_outputs(self.student, self._outputs, *placed)

    @property
    def skips(self) -> dict[str, SkipPlan]:
        """See `Backend`."""
        return dict(self._skips)

    @property
    def outputs(self) -> dict[str, OutputPlan]:
        """See `Backend`."""
        return dict(self._outputs)

    def _own(self, placed: Mapping[str, LearnableFakeQuantize]) -> dict[str, LearnableFakeQuantize]:
        """Return those quantizers that are no layer's, by their key."""
        of_layers = {layer.input_fake_quant for layer in self.layers.values()}
        return {giver: quantizer for giver, quantizer in placed.items() if quantizer not in of_layers}

    @property
    def sites(self) -> Sites:
        """See `Backend`."""
        inputs: dict[LearnableFakeQuantize, str] = {}
        for name, layer in self.layers.items():
            inputs.setdefault(layer.input_fake_quant, f"The input of {name!r}")
        for giver, quantizer in self._own(self._added).items():
            inputs[quantizer] = f"What is added to the output of {giver!r}"
        for giver, quantizer in self._own(self._rounded).items():
            inputs[quantizer] = f"The output of {giver or 'the network'!r}"
        return Sites(
            {
                name: WeightSite(name, layer, OwnQuantizer(layer.weight_fake_quant), layer.float_forward)
                for name, layer in self.layers.items()
            },
            tuple(ActivationSite(where, OwnQuantizer(each)) for each, where in inputs.items()),
        )

    @property
    def plans(self) -> dict[str, LayerPlan]:
        """See `Backend`."""
        return dict(self._plans)

    def attach_affine(self) -> None:
        """See `Backend`; a weight that two layers share cannot take two affine layers in."""
        owners = Counter(id(p) for layer in self.layers.values() for p in (weight_of(layer), layer.bias))
        for layer in self.layers.values():
            if owners[id(weight_of(layer))] == 1 and owners[id(layer.bias)] == 1:
                attach_affine(layer, inside=not self._target.folds_exactly)

    def learners(self) -> dict[str, Learner]:
        """See `Backend`."""
        learners: dict[str, Learner] = {name: LayerLearner(layer) for name, layer in self.layers.items()}
        for giver, quantizer in self._own(self._added).items():
            adding = self._skips[giver].adding
            name = ".".join(part for part in (adding, SKIPS, giver) if part)
            learners[name] = SkipLearner(self.student.get_submodule(adding), quantizer)
        for giver, quantizer in self._own(self._rounded).items():
            name = ".".join(part for part in (giver, OUTPUT) if part)
            learners[name] = SkipLearner(self.student.get_submodule(giver), quantizer)
        return learners

    def fold(self, teacher: nn.Module, left_float: Mapping[str, str]) -> None:
        """Fold the affine layers, lay weights on their grid, and give failed layers their float weights back."""
        ended = [giver for giver, plan in self._outputs.items() if set(plan.layers) & left_float.keys()]
        remove_outputs(self.student, ended)
        self._outputs = {giver: plan for giver, plan in self._outputs.items() if giver not in ended}
        for name in left_float:
            self._plans.pop(name)
            layer, original = float_layer(self.layers[name]), teacher.get_submodule(name)
            layer._parameters.update(copy.deepcopy(original)._parameters)
        lost = [giver for giver, plan in self._skips.items() if plan.layer in left_float]
        remove_skips(self.student, lost)
        self._skips = {giver: plan for giver, plan in self._skips.items() if giver not in lost}
        for quantizer in (*self._added.values(), *self._rounded.values()):
            _finish(quantizer)
        folded = dict.fromkeys(layer for name, layer in self.layers.items() if name not in left_float)
        for layer in folded:
            fold_affine(layer)
            for quantizer in (layer.weight_fake_quant, layer.input_fake_quant):
                _finish(quantizer)
        owners = Counter(id(layer.bias) for layer in folded)
        for layer in folded:
            if self._target.rounds_biases and owners[id(layer.bias)] == 1:
                round_bias(layer)


def _finish(quantizer: LearnableFakeQuantize) -> None:
    """Leave a quantizer as it is delivered."""
    quantizer.enable_observer(False)
    quantizer.enable_fake_quant(True)  # a stage that stays float may share one with these
    quantizer.activation_post_process.reset_min_max_vals()


class OwnBackend(PlainBackend[CalibrationResult]):
    """The backend of `repapq_plugin.quantize_model`."""

    def deliver(self, calibrated: Calibrated, batches: Sequence[Batch]) -> CalibrationResult:
        """Return a result that can be saved."""
        return CalibrationResult(**vars(calibrated))
