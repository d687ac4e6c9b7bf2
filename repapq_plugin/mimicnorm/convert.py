"""`convert`: from a network with batch norms to one with MimicNorm, ready to be trained from scratch."""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from repapq_plugin.core.running import inference, tensors_of
from repapq_plugin.core.tensor_notes import TensorNotes
from repapq_plugin.errors import ConfigError
from repapq_plugin.mimicnorm.layers import LastBatchNorm, MimicNorm2d
from repapq_plugin.mimicnorm.weight_mean import WeightMean, fan_in, takes_weight_mean

logger = logging.getLogger(__name__)

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
RELU_GAIN = 2.0
MEAN_FREE_GAIN = 2 * math.pi / (math.pi - 1)
"""Variance of a weight times its fan-in that keeps activations as large as they were. A mean-free filter only sees the
variance of a rectified normal variable, (1 - 1/pi) / 2 of what it was, not its square (our derivation, 2.93; the
authors take 2.8 to 2.88)."""

RESIDUAL_GAIN = 1.2
"""The k-th residual branch starts at this to the power of its layers, divided by k (the authors' code)."""

# At inference these return what they are given.
_PASSING = {"dropout", "feature_dropout", "detach", "contiguous"}
_ADDITIONS = {"add", "add_", "__add__", "__iadd__", "__radd__"}


@dataclass(frozen=True)
class Conversion:
    """A converted network and what was done to it.

    Args:
        model: The network; a copy.
        replaced: Module paths of the norms that are gone.
        residual: Paths among them that end a residual or parallel branch, with their starting scalar.
        last: Module paths of the last layers, which a `LastBatchNorm` follows now.
        kept: Norms left alone, because the layer in front of them is frozen.
    """

    model: nn.Module
    replaced: tuple[str, ...]
    residual: Mapping[str, float]
    last: tuple[str, ...]
    kept: tuple[str, ...]


@dataclass(frozen=True)
class _Seen:
    """What is known of one tensor of the run."""

    depth: int  # most layers on a way to it from the input
    terms: tuple[tuple[nn.Module | None, int], ...] = ()  # a sum: norms it adds up, and their depths
    layer: nn.Module | None = None  # whose output it is


class _Run(TorchFunctionMode):
    """Follows tensors through one run: depths, sums of norms' outputs, which layer made what."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: list[tuple[tuple[nn.Module | None, int], ...]] = []
        self.layer_before: dict[nn.Module, nn.Module | None] = {}
        self.order: list[nn.Module] = []
        self.output: Any = None
        self._seen: TensorNotes[_Seen] = TensorNotes()

    def seen(self, tensor: Any) -> _Seen:
        return self._seen.get(tensor) or _Seen(0)

    def note(self, tensor: Any, seen: _Seen) -> None:
        if isinstance(tensor, Tensor):
            self._seen.put(tensor, seen)

    def layer_ran(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.order.append(layer)
        self.note(output, _Seen(self.seen(args[0]).depth + 1, layer=layer))

    def norm_ran(self, norm: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        before = self.seen(args[0])
        self.layer_before[norm] = before.layer
        self.note(output, _Seen(before.depth, ((norm, before.depth),)))

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        inputs = [self.seen(tensor) for tensor in tensors_of([args, kwargs or {}])]
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if isinstance(result, Tensor) and name not in _PASSING:
            depth = max((seen.depth for seen in inputs), default=0)
            if name in _ADDITIONS:
                terms = tuple(term for seen in inputs for term in (seen.terms or ((None, seen.depth),)))
                self.sums = [known for known in self.sums if not set(known) < set(terms)]
                self.sums += [terms] if len(inputs) > 1 else []
                self.note(result, _Seen(depth, terms))
            elif inputs:
                self.note(result, _Seen(depth))
        return result


def convert(
    model: nn.Module,
    example: Any,
    *,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    last: str | None = None,
    initialise: bool = True,
) -> Conversion:
    """Replace every batch norm of a copy of ``model`` by MimicNorm.

    Train what comes out with `WeightMean` attached to its optimizer, or after `parametrize_weight_mean`. At
    deployment everything merges: biases and scalars into the layers in front of them, branches by addition, the last
    norm into the last layer; `quantize_model` does so by itself.

    Args:
        model: Any network with batch norms; not changed.
        example: A batch of real or random samples; it shows how the network is put together, and how large
            activations are.
        forward_fn: ``forward_fn(model, example)`` runs it; default: ``model(example)``.
        last: Module path of the last layer, if the network returns something else than that layer's output.
        initialise: Draw new weights. False keeps them, for what was trained with MimicNorm before.

    Raises:
        ConfigError: The last layer cannot be found, or a module is lazy.
    """
    converted = copy.deepcopy(model)
    forward = forward_fn or _call
    _last_layer(converted, _observe(converted, lambda: forward(converted, example)), last)  # an error before any work
    replaced, kept = replace_batch_norms(converted, example, forward_fn=forward_fn)
    finished = prepare(converted, example, forward_fn=forward_fn, last=last, initialise=initialise)
    return replace(finished, replaced=replaced, kept=kept)


def replace_batch_norms(
    model: nn.Module, example: Any, *, forward_fn: Callable[[nn.Module, Any], Any] | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Put a `MimicNorm2d`, in place, where a batch norm stands; its bias parameter goes on at zero.

    Args:
        model: The network; changed.
        example: A batch, as in `convert`.
        forward_fn: Runs it, as in `convert`.

    Returns:
        Module paths of the norms that are gone, and of those kept, because the layer in front of them is frozen.
    """
    forward = forward_fn or _call
    names = {module: name for name, module in model.named_modules()}
    layer_before: dict[nn.Module, Any] = {
        norm: layer
        for norm, layer in _observe(model, lambda: forward(model, example)).layer_before.items()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm)
    }
    kept = {norm for norm, layer in layer_before.items() if layer is not None and _frozen(layer)}
    replacements: dict[nn.Module, nn.Module] = {}
    for norm in layer_before.keys() - kept:
        has_bias = getattr(layer_before[norm], "bias", None) is not None
        new = MimicNorm2d(norm.num_features, bias=not has_bias).train(norm.training)  # type: ignore[arg-type]
        if new.bias is not None and isinstance(norm.bias, nn.Parameter):
            new.bias = norm.bias  # an optimizer knows it already
            nn.init.zeros_(new.bias)
        replacements[norm] = new
    _replace(model, replacements)
    return tuple(names[norm] for norm in layer_before if norm not in kept), tuple(names[norm] for norm in kept)


def prepare(
    model: nn.Module,
    example: Any,
    *,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    last: str | Sequence[str] | None = None,
    initialise: bool = True,
) -> Conversion:
    """Finish, in place, a network that was built with `MimicNorm2d`: branch scalars, the last norm, new weights.

    Args:
        model: The network; changed.
        example: A batch, as in `convert`.
        forward_fn: Runs it, as in `convert`.
        last: Module paths of the layers that a `LastBatchNorm` is to follow; default: the one that the network
            returns the output of.
        initialise: Draw new weights.

    Raises:
        ConfigError: The last layer cannot be found, or a module is lazy.
    """
    forward = forward_fn or _call
    names = {module: name for name, module in model.named_modules()}
    run = _observe(model, lambda: forward(model, example))
    chosen = [last] if last is None or isinstance(last, str) else list(last)
    lasts = [_last_layer(model, run, name) for name in chosen]
    scales = _branch_scales(run)
    for norm, start in scales.items():
        norm.scale = nn.Parameter(next(model.parameters()).new_tensor([start]))
    replacements: dict[nn.Module, nn.Module] = {}
    for layer in lasts:
        norm = LastBatchNorm(layer.weight.shape[0]).to(layer.weight.device).train(layer.training)
        replacements[layer] = nn.Sequential(layer, norm)
    _replace(model, replacements)
    if initialise:
        initialise_weights(model, [layer for layer in run.order if not _frozen(layer)], forward, example)
    return Conversion(
        model, (), {names[norm]: start for norm, start in scales.items()}, tuple(names[layer] for layer in lasts), ()
    )


def layers_with_norms(model: nn.Module, forward: Callable[[], Any]) -> list[nn.Module]:
    """Return the convolutions and linear layers right in front of a norm, in the order in which ``forward()`` runs."""
    run = _observe(model, forward)
    with_norms = {run.layer_before[norm] for norm in run.layer_before}
    return [layer for layer in dict.fromkeys(run.order) if layer in with_norms]


def _call(network: nn.Module, batch: Any) -> Any:
    return network(batch)


def _frozen(layer: Any) -> bool:
    return not layer.weight.requires_grad


def _observe(model: nn.Module, forward: Callable[[], Any]) -> _Run:
    run = _Run()
    for name, module in model.named_modules():
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters(recurse=False)):
            raise ConfigError(f"{name!r} has no weights yet; run the model once on a batch before converting it.")
    # As at inference: a batch of one sample will do, and no statistics change.
    with ExitStack() as stack, inference(model):
        for module in model.modules():
            if isinstance(module, LAYERS):
                stack.callback(module.register_forward_hook(run.layer_ran).remove)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm | MimicNorm2d):
                stack.callback(module.register_forward_hook(run.norm_ran).remove)
        with run:
            run.output = forward()
    return run


def _last_layer(model: nn.Module, run: _Run, last: str | None) -> Any:
    if last is not None:
        modules = dict(model.named_modules())
        if not isinstance(modules.get(last), LAYERS):
            raise ConfigError(f"last={last!r} is not a convolution or linear layer of the model.")
        return modules[last]
    outputs = run.output if isinstance(run.output, list | tuple) else [run.output]
    makers = [run.seen(tensor).layer for tensor in outputs]
    if len(makers) != 1 or makers[0] is None:
        raise ConfigError(
            f"The last layer cannot be found: the model returns {len(makers)} values, and not just the output of one "
            "convolution or linear layer. Name it with last='module.path'."
        )
    return makers[0]


def _branch_scales(run: _Run) -> dict[Any, float]:
    """Return the starting scalar of each `MimicNorm2d` that ends a branch of a sum.

    The shallowest way into a sum is its shortcut and stays. Where all ways are equally deep there is none: each of n
    is divided by the square root of n, so that their sum is as large as one.
    """
    scales: dict[nn.Module, float] = {}
    block = 0
    for terms in run.sums:
        deepest, shallowest = max(depth for _, depth in terms), min(depth for _, depth in terms)
        branches = [norm for norm, depth in terms if isinstance(norm, MimicNorm2d) and depth == deepest]
        if not branches:
            continue
        start = 1.0
        if deepest > shallowest:
            block += 1
            start = RESIDUAL_GAIN ** (deepest - shallowest) / block
        for norm in branches:
            scales[norm] = start / math.sqrt(len(branches))
    return scales


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                parent._modules[key] = replacements[child]


@torch.no_grad()
def initialise_weights(
    model: nn.Module,
    layers: Sequence[nn.Module],
    forward: Callable[[nn.Module, Any], Any],
    example: Any,
) -> None:
    """Draw He-normal weights, project them, and scale each layer so that its output varies by one.

    The scaling is our choice: gains are derived for inputs behind a ReLU, and not every layer has one in front
    (a depthwise layer's reader in ShuffleNet), which otherwise adds up over the depth.

    Args:
        model: The converted network; changed.
        layers: Those to initialise.
        forward: Runs the network on ``example``.
        example: A batch.
    """
    for layer in dict.fromkeys(layers):
        gain = MEAN_FREE_GAIN if takes_weight_mean(layer) else RELU_GAIN
        nn.init.normal_(layer.weight, std=math.sqrt(gain / fan_in(layer)))  # type: ignore[arg-type]
        if getattr(layer, "bias", None) is not None:
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    WeightMean(model).apply()
    calls: Counter[nn.Module] = Counter()

    def scale(layer: Any, _: Any, output: Tensor) -> Tensor | None:
        calls[layer] += 1
        spread = output.float().std()
        if calls[layer] > 1 or not bool(spread.isfinite()) or float(spread) == 0:
            return None
        layer.weight /= spread
        return output / spread

    with ExitStack() as stack, inference(model):
        for layer in dict.fromkeys(layers):
            stack.callback(layer.register_forward_hook(scale).remove)
        forward(model, example)
