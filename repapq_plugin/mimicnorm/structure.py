"""How a network is put together, as far as MimicNorm wants to know: seen in one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from repapq_plugin.core.hooks import Hooks
from repapq_plugin.core.running import inference
from repapq_plugin.core.tensor_notes import TensorNotes
from repapq_plugin.core.tensors import tensors_of
from repapq_plugin.core.watch import FunctionWatch
from repapq_plugin.errors import ConfigError
from repapq_plugin.mimicnorm.layers import MimicNorm2d
from repapq_plugin.mimicnorm.weight_mean import Layer

RESIDUAL_GAIN = 1.2
"""The k-th residual branch starts at this to the power of its layers, divided by k (the authors' code)."""

# At inference these hand on the values that they are given.
_PASSING = {"dropout", "feature_dropout", "detach", "contiguous", "clone", "to"}
_ADDITIONS = {"add", "add_", "__add__", "__iadd__", "__radd__"}


@dataclass(frozen=True)
class Seen:
    """What is known of one tensor of the run."""

    depth: int  # most layers on a way to it from the input
    terms: tuple[tuple[nn.Module | None, int], ...] = ()  # norms it adds up, and their depths
    layer: Layer | None = None  # whose output it is


class Run(FunctionWatch):
    """Follows tensors through one run: depths, sums of norms' outputs, which layer made what.

    A sum of three is two additions, and the first result is read by the second alone. A sum that something else read
    as well (the branch that is added to it next) stands for itself: an end of a block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sums: list[tuple[tuple[nn.Module | None, int], ...]] = []
        self.layer_before: dict[nn.Module, Layer | None] = {}
        self.order: list[Layer] = []
        self.output: object = None
        self._seen: TensorNotes[Seen] = TensorNotes()
        self._inside: nn.Module | None = None

    def seen(self, tensor: object) -> Seen:
        """Return what is known of a tensor; one that nothing made is an input."""
        return self._seen.get(tensor) or Seen(0)

    def note(self, tensor: object, seen: Seen) -> None:
        """Note what is known of a result, if it is a tensor."""
        if isinstance(tensor, Tensor):
            self._seen.put(tensor, seen)

    def layer_ran(self, layer: Layer, args: tuple[object, ...], output: object) -> None:
        """Hook behind a convolution or linear layer."""
        self.order.append(layer)
        self.note(output, Seen(self.seen(args[0]).depth + 1, layer=layer))

    def norm_runs(self, norm: nn.Module, _: tuple[object, ...]) -> None:
        """Hook in front of a norm, whose own sums are no branches."""
        self._inside = norm

    def norm_ran(self, norm: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Hook behind a norm."""
        self._inside = None
        before = self.seen(args[0])
        self.layer_before[norm] = before.layer
        self._read([args[0]])
        self.note(output, Seen(before.depth, ((norm, before.depth),)))

    def before(
        self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> tuple[list[Tensor], list[Seen]]:
        """Read what is known of the arguments, which a function may overwrite."""
        tensors = [value for value in tensors_of([args, kwargs]) if not isinstance(value, nn.Parameter)]
        return tensors, [self.seen(tensor) for tensor in tensors]

    def after(
        self,
        name: str,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        result: object,
        note: tuple[list[Tensor], list[Seen]],
    ) -> None:
        """Note what is known of a result; inside a norm nothing is."""
        tensors, inputs = note
        if self._inside is not None or not isinstance(result, Tensor) or not inputs:
            return
        depth = max(seen.depth for seen in inputs)
        if name in _PASSING:
            self.note(result, inputs[0])
        elif name in _ADDITIONS and len(inputs) == 1:  # a parameter or a number is added: no branch
            self.note(result, replace(inputs[0], layer=None))
        elif name in _ADDITIONS:
            terms = tuple(term for seen in inputs for term in (seen.terms or ((None, seen.depth),)))
            self.sums = [known for known in self.sums if not set(known) < set(terms)] + [terms]
            self.note(result, Seen(depth, terms))
        else:
            self._read(tensors)
            self.note(result, Seen(depth))

    def _read(self, tensors: Iterable[object]) -> None:
        for tensor in tensors:
            seen = self.seen(tensor)
            if len(seen.terms) > 1:
                self.note(tensor, replace(seen, terms=()))


def observe(model: nn.Module, forward: Callable[[], object]) -> Run:
    """Watch ``forward()`` run ``model``, as at inference.

    Raises:
        ConfigError: A module is lazy and has no weights yet.
    """
    run = Run()
    for name, module in model.named_modules():
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters(recurse=False)):
            raise ConfigError(f"{name!r} has no weights yet; run the model once on a batch before converting it.")
    # As at inference: a batch of one sample will do, and no statistics change.
    with Hooks() as hooks, inference(model):
        for module in model.modules():
            if isinstance(module, Layer):
                hooks.after(module, run.layer_ran)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm | MimicNorm2d):
                hooks.before(module, run.norm_runs)
                hooks.after(module, run.norm_ran)
        with run:
            run.output = forward()
    return run


def last_layer(model: nn.Module, run: Run, last: str | None) -> Layer:
    """Return the layer of that path, or the one whose output the network returned.

    Raises:
        ConfigError: There is no such layer.
    """
    if last is not None:
        named = dict(model.named_modules()).get(last)
        if not isinstance(named, Layer):
            raise ConfigError(f"last={last!r} is not a convolution or linear layer of the model.")
        return named
    outputs = run.output if isinstance(run.output, list | tuple) else [run.output]
    makers = [run.seen(tensor).layer for tensor in outputs]
    if len(makers) != 1 or makers[0] is None:
        raise ConfigError(
            f"The last layer cannot be found: the model returns {len(makers)} values, and not just the output of one "
            "convolution or linear layer. Name it with last='module.path'."
        )
    return makers[0]


def branch_scales(run: Run) -> dict[MimicNorm2d, float]:
    """Return the starting scalar of each `MimicNorm2d` that ends a branch of a sum.

    The shallowest way into a sum is its shortcut and stays. Where all ways are equally deep there is none: each of n
    is divided by the square root of n, so that their sum is as large as one.
    """
    scales: dict[MimicNorm2d, float] = {}
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


def layers_with_norms(model: nn.Module, forward: Callable[[], object]) -> list[Layer]:
    """Return the convolutions and linear layers right in front of a norm, in the order in which ``forward()`` runs."""
    run = observe(model, forward)
    with_norms = set(run.layer_before.values())
    return [layer for layer in dict.fromkeys(run.order) if layer in with_norms]
