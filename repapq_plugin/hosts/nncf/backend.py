"""`NNCFBackend`: NNCF places its own quantizers, the one job gives them ranges and lets them learn."""

from __future__ import annotations

import copy
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import nncf
from nncf.quantization.advanced_parameters import AdvancedSmoothQuantParameters
from torch import Tensor, nn

from repapq_plugin.backend import PHASES, Backend, Placing
from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.copies import own_batch, own_copy
from repapq_plugin.core.fingerprints import digest, digests_of
from repapq_plugin.core.hooks import unseen
from repapq_plugin.core.running import Batch
from repapq_plugin.errors import CalibrationError, ConfigError, HostError
from repapq_plugin.hosts.nncf._compat import EXTENSION_TIMEOUT, build_nncf_graph
from repapq_plugin.hosts.nncf.affine import attach_affine, can_take_affine, fold_affine
from repapq_plugin.hosts.nncf.data import check_items, joined
from repapq_plugin.hosts.nncf.few_bits import carry_few_bits, set_bits
from repapq_plugin.hosts.nncf.learners import ActivationLearner, WeightLearner
from repapq_plugin.hosts.nncf.operations import find_operations
from repapq_plugin.hosts.nncf.placement import Placement, find_placement
from repapq_plugin.hosts.nncf.quantizers import CorrectedBias, NNCFQuantizer, in_logarithms
from repapq_plugin.hosts.nncf.running import Call, counting_skipped, run_alone, watch_calls
from repapq_plugin.method.learners import Learner
from repapq_plugin.method.sites import ActivationSite, Sites, WeightSite
from repapq_plugin.policy import check_target
from repapq_plugin.quantizers.layers import QUANTIZABLE, ChannelAffine, bias_of
from repapq_plugin.quantizers.plan import LayerPlan
from repapq_plugin.result import Calibrated

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""What differs from process to process in the text of an object."""

NO_SMOOTHING = -1.0
"""The strength with which NNCF does not smooth."""


@dataclass(frozen=True)
class NNCFOptions:
    """What `nncf.quantize` is told; see there."""

    preset: nncf.QuantizationPreset | None = None
    target_device: nncf.TargetDevice = nncf.TargetDevice.ANY
    fast_bias_correction: bool = True
    model_type: nncf.ModelType | None = None
    ignored_scope: nncf.IgnoredScope | None = None
    advanced_parameters: nncf.AdvancedQuantizationParameters | None = None


class PlacedBackend(Backend[Calibrated]):
    """Calibrates a model that NNCF has quantized already, in place.

    NNCF's choice of what is quantized, its signs and its shared quantizers stay. Weights and inputs of layers get the
    bits of the configuration; activations that no layer reads keep 8.

    Args:
        student: The model, in evaluation mode.
    """

    phases = tuple(phase for phase in PHASES if phase not in ("merge", "condition"))
    places_again = False
    unplaced = "left float by NNCF"
    packages = ("nncf",)

    def __init__(self, student: nn.Module) -> None:
        self.student = student

    def check(self, model: nn.Module, batches: Sequence[Batch], config: RepAPQConfig) -> None:
        """Refuse targets other than OpenVINO, dropped quantization, and data that the model cannot be run on."""
        check_target(config, "NNCF", ("generic", "openvino"))
        if config.drop_probability:
            raise ConfigError(
                f"drop_probability={config.drop_probability} is not allowed with NNCF, whose quantizers drop nothing; "
                "choose 0."
            )
        check_items(own_copy(model), [own_batch(batch) for batch in batches])

    def told(self) -> dict[str, str]:
        """Return which model NNCF has quantized, and how."""
        return {"the quantized model": digest(digests_of(self.student))}

    def join(self, teacher: nn.Module, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Join small items into batches, see `joined`."""
        return joined(teacher, batches)

    def place(self, task: Placing) -> None:
        """Find NNCF's quantizers and give them their bits.

        Raises:
            CalibrationError: NNCF quantized no layer.
        """
        student = self.student
        self._trained = [(parameter, parameter.requires_grad) for parameter in student.parameters()]
        for parameter, _ in self._trained:
            parameter.requires_grad_(False)

        def run() -> object:
            return task.forward(student, task.batches[0])

        self._run = run
        self.placement = find_placement(student, build_nncf_graph(student, own_batch(task.batches[0])), run)
        if not self.placement.weights:
            raise CalibrationError("NNCF quantized no convolution or linear layer; widen what ignored_scope leaves.")
        self._plans = set_bits(self.placement, task.trace, task.config)
        self._enabled = [(quantizer, quantizer.enabled.clone()) for quantizer in self.placement.quantizers]
        self._affines: dict[str, ChannelAffine] = {}
        self._biases = corrected_biases(task.teacher, self.placement)

    @property
    def sites(self) -> Sites:
        """See `Backend`."""
        weights = {
            name: WeightSite(
                name, placed.module, NNCFQuantizer(placed.quantizer, self._biases.get(name)), hidden(placed.module)
            )
            for name, placed in self.placement.weights.items()
        }
        activations = (
            ActivationSite(f"The activation at {placed.hooks[0]!r}", NNCFQuantizer(placed.quantizer))
            for placed in self.placement.activations
        )
        return Sites(weights, tuple(activations))

    @property
    def plans(self) -> dict[str, LayerPlan]:
        """See `Backend`; a layer's group is the number of the quantizer in front of it."""
        return dict(self._plans)

    def attach_affine(self) -> None:
        """See `Backend`; a weight that two layers share cannot take two affine layers in."""
        layers = [placed.module for placed in self.placement.weights.values()]
        owners = Counter(id(parameter) for layer in layers for parameter in layer.parameters(recurse=False))
        self._affines = {
            name: attach_affine(self.student, placed)
            for name, placed in self.placement.weights.items()
            if can_take_affine(placed)
            and all(owners[id(parameter)] == 1 for parameter in placed.module.parameters(recurse=False))
        }

    def learners(self) -> dict[str, Learner]:
        """See `Backend`."""
        found: dict[str, Learner] = {
            name: WeightLearner(placed.module, placed.quantizer, self._affines.get(name))
            for name, placed in self.placement.weights.items()
        }
        for placed in self.placement.activations:
            # The name of the hook makes the path unique; what counts is the module that it begins with.
            found[f"{placed.inside}.{placed.hooks[0]}"] = ActivationLearner(placed.quantizer)
        return found

    @contextmanager
    def learning(self, names: Sequence[str]) -> Iterator[None]:
        """Let ranges learn as logarithms, and parts run alone or be skipped as NNCF counts them."""
        self._calls: dict[str, list[Call]] = watch_calls(self.student, dict.fromkeys(names), self._run)
        with in_logarithms(self.placement.quantizers), counting_skipped(self.student, self._calls):
            yield

    def run_alone(self, name: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        """See `Backend`."""
        return run_alone(self.student, name, inputs, self._calls[name])

    def fold(self, teacher: nn.Module, left_float: Mapping[str, str]) -> None:
        """Fold the affine layers and carry few bits in 8; what could not be run alone stays as NNCF quantized it."""
        for name, affine in self._affines.items():
            fold_affine(self.student, self.placement.weights[name], affine)
        for quantizer, enabled in self._enabled:
            quantizer.enabled.copy_(enabled)
        carry_few_bits(self.student, self.placement)
        for parameter, required in self._trained:
            parameter.requires_grad_(required)

    def deliver(self, calibrated: Calibrated, batches: Sequence[Batch]) -> Calibrated:
        """Return the model as `nncf.quantize` would, with the record of it."""
        layers = {name for name, module in self.student.named_modules() if isinstance(module, QUANTIZABLE)}
        others = [name for name in calibrated.float_layers if name not in layers]
        if not others:
            return calibrated
        kept = {name: reason for name, reason in calibrated.float_layers.items() if name in layers}
        named = ", ".join(repr(name) if name else "the network" for name in others)
        note = f"What {named} computes with weights by itself, NNCF quantizes as it decides."
        return replace(calibrated, plan=replace(calibrated.plan, float_layers=kept), notes=(*calibrated.notes, note))


class NNCFBackend(PlacedBackend):
    """Lets `nncf.quantize` place quantizers on the merged network, and calibrates them.

    Args:
        options: What `nncf.quantize` is told.
    """

    phases = PHASES
    places_again = True

    def __init__(self, options: NNCFOptions | None = None) -> None:
        self.options = options or NNCFOptions()

    def told(self) -> dict[str, str]:
        """Return what `nncf.quantize` is told."""
        return {key: _ADDRESS.sub("", str(value)) for key, value in vars(self.options).items()}

    def place(self, task: Placing) -> None:
        """Quantize a copy of the teacher with NNCF, all but the layers that are not planned.

        Raises:
            ConfigError: ``ignored_scope`` names what the model has not.
            HostError: NNCF cannot trace or quantize the model.
        """
        self.student = self._quantized(task)
        super().place(task)

    def _quantized(self, task: Placing) -> nn.Module:
        options, names = self.options, list[str]()
        scope, teacher, batches = options.ignored_scope, task.teacher, task.batches
        try:
            with _time_to_compile():
                operations = find_operations(teacher, own_batch(batches[0]), task.plans)
                names = operations.of_layers
                if operations.left_float:
                    scope = copy.deepcopy(scope) if scope is not None else nncf.IgnoredScope()
                    scope.names += operations.left_float
                placed: nn.Module = nncf.quantize(
                    teacher,
                    nncf.Dataset(list(batches), own_batch),  # a network may change what it is given
                    preset=options.preset,
                    target_device=options.target_device,
                    subset_size=len(batches),
                    fast_bias_correction=options.fast_bias_correction,
                    model_type=options.model_type,
                    ignored_scope=scope,
                    advanced_parameters=without_smoothing(options.advanced_parameters),
                )
        except nncf.ValidationError as error:
            raise ConfigError(
                f"{str(error).strip()} Change ignored_scope; names in it are those of the merged model, such as "
                f"{', '.join(names[:3])}."
            ) from error
        except Exception as error:  # whatever a model does that NNCF did not foresee
            raise HostError(
                f"NNCF cannot quantize {type(teacher).__name__}: {type(error).__name__}: {error} Leave out the part "
                "that it cannot trace, or quantize with repapq_plugin.quantize_model, which does not trace."
            ) from error
        return placed


def without_smoothing(
    parameters: nncf.AdvancedQuantizationParameters | None,
) -> nncf.AdvancedQuantizationParameters:
    """Return parameters with which NNCF leaves the float network as it is.

    Smoothing, NNCF's default for transformers, scales weights and activations, so that what is learned from the float
    network no longer fits. The plugin's own equalization has been done already. What somebody asks for is kept.
    """
    given = copy.deepcopy(parameters) or nncf.AdvancedQuantizationParameters()
    if given.smooth_quant_alphas == AdvancedSmoothQuantParameters():
        given.smooth_quant_alphas = AdvancedSmoothQuantParameters(convolution=NO_SMOOTHING, matmul=NO_SMOOTHING)
    return given


def corrected_biases(teacher: nn.Module, placement: Placement) -> dict[str, CorrectedBias]:
    """Return what NNCF may have added a correction to, by the layer's module path; one for each bias that is shared."""
    found: dict[int, CorrectedBias] = {}
    by_name: dict[str, CorrectedBias] = {}
    for name, placed in placement.weights.items():
        bias, of_float = bias_of(placed.module), bias_of(teacher.get_submodule(name))
        if bias is not None and of_float is not None:
            by_name[name] = found.setdefault(id(bias), CorrectedBias(bias, of_float))
    return by_name


def hidden(layer: nn.Module) -> Callable[..., Tensor]:
    """Return what runs a layer's own forward unseen by NNCF."""

    def run(*args: object, **kwargs: object) -> Tensor:
        with unseen():
            output: Tensor = layer.forward(*args, **kwargs)
        return output

    return run


@contextmanager
def _time_to_compile() -> Iterator[None]:
    """Let NNCF compile its kernels, which it does once per machine, for as long as a slow machine takes."""
    before = os.environ.get(EXTENSION_TIMEOUT)
    os.environ.setdefault(EXTENSION_TIMEOUT, "0")
    try:
        yield
    finally:
        if before is None:
            del os.environ[EXTENSION_TIMEOUT]
