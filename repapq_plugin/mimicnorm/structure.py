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
from repapq_plugin.mimicnorm.weight_mean import Layer, is_depthwise

BRANCH_GAIN = 1.2
"""The k-th residual branch starts at this to the power of its layers, divided by k; a concatenated branch at this to
the power of its layers that are not depthwise (the authors' code, their ShuffleNetV2 for the latter)."""

# At inference these hand on the values that they are given.
_PASSING = {"dropout", "feature_dropout", "detach", "contiguous", "clone", "to"}
_ADDITIONS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
_CONCATENATIONS = {"cat", "concat", "concatenate"}


@dataclass(frozen=True)
class Seen:
    """What is known of one tensor of the run."""

    depth: int  # most layers on a way to it from the input
    terms: tuple[tuple[nn.Module | None, int], ...] = ()  # norms it adds up, and their depths
    layer: Layer | None = None  # whose output it is
    calls: frozenset[int] = frozenset()  # calls of layers on all ways to it, by their number
    dense: int = 0  # most layers on a way to it from the input, less depthwise ones
    since: int = 0  # the same from the last sum or concatenation
    concatenated: bool = False  # which of the two that was
    end: nn.Module | None = None  # the norm behind a layer whose output it is, through functions of one tensor


class Run(FunctionWatch):
    """Follows tensors through one run: depths, sums and concatenations of norms' outputs, which layer made what.

    A sum of three is two additions, and the first result is read by the second alone. A sum that something else read
    as well (the branch that is added to it next) stands for itself: an end of a block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sums: list[tuple[tuple[nn.Module | None, int], ...]] = []
        self.concatenations: list[list[Seen]] = []
        self.read_by: dict[Layer, Seen] = {}
        self.dense_at: list[int] = []
        """How many layers that are not depthwise are on the way to each call's output, the call's own counted."""
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
        before, dense = self.seen(args[0]), int(not is_depthwise(layer))
        calls = before.calls | {len(self.dense_at)}
        self.read_by[layer] = before
        self.dense_at.append(before.dense + dense)
        made = Seen(before.depth + 1, layer=layer, calls=calls, concatenated=before.concatenated)
        self.note(output, replace(made, dense=before.dense + dense, since=before.since + dense))

    def norm_runs(self, norm: nn.Module, _: tuple[object, ...]) -> None:
        """Hook in front of a norm, whose own sums are no branches."""
        self._inside = norm

    def norm_ran(self, norm: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Hook behind a norm."""
        self._inside = None
        before = self.seen(args[0])
        self.layer_before[norm] = before.layer
        self._read([args[0]])
        end = None if before.layer is None else norm
        self.note(output, replace(before, terms=((norm, before.depth),), layer=None, end=end))

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
        if self._inside is not None or not inputs:
            return
        if name in _PASSING:
            self.note(result, inputs[0])
        elif name in _ADDITIONS and len(inputs) == 1:  # a parameter or a number is added: no branch
            self.note(result, replace(inputs[0], layer=None))
        elif name in _ADDITIONS:
            terms = tuple(term for seen in inputs for term in (seen.terms or ((None, seen.depth),)))
            self.sums = [known for known in self.sums if not set(known) < set(terms)] + [terms]
            self.note(result, replace(_joined(inputs), terms=terms, since=0, concatenated=False))
        elif name in _CONCATENATIONS and joins_channels(tensors, result):
            self._read(tensors)
            self.concatenations.append(inputs)
            self.note(result, replace(_joined(inputs), since=0, concatenated=True))
        else:
            self._read(tensors)
            for made in tensors_of(result):
                self.note(made, _joined(inputs))

    def _read(self, tensors: Iterable[object]) -> None:
        for tensor in tensors:
            seen = self.seen(tensor)
            if len(seen.terms) > 1:
                self.note(tensor, replace(seen, terms=()))


def _joined(inputs: list[Seen]) -> Seen:
    """Return what is known of the result of a function of these."""
    return Seen(
        max(seen.depth for seen in inputs),
        calls=frozenset().union(*(seen.calls for seen in inputs)),
        dense=max(seen.dense for seen in inputs),
        since=max(seen.since for seen in inputs),
        concatenated=any(seen.concatenated for seen in inputs),
        end=inputs[0].end if len(inputs) == 1 else None,
    )


def joins_channels(tensors: list[Tensor], result: object) -> bool:
    """Tell whether a result holds the channels, along dimension 1, of two tensors or more."""
    deep = isinstance(result, Tensor) and len(tensors) > 1 and all(tensor.dim() > 1 for tensor in tensors)
    return deep and isinstance(result, Tensor) and result.shape[1] == sum(tensor.shape[1] for tensor in tensors)


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
            start = BRANCH_GAIN ** (deepest - shallowest) / block
        for norm in branches:
            scales[norm] = start / math.sqrt(len(branches))
    return scales


def concatenation_scales(run: Run, lasts: Iterable[Layer] = ()) -> dict[MimicNorm2d, float]:
    """Return the starting scalar of each `MimicNorm2d` that ends a branch of a concatenation of channels.

    A branch starts where the ways into the concatenation part, or at the last sum or concatenation before, whichever
    is later, and ends in a norm behind a layer; an activation, a pooling or a resize may follow. It starts at
    `BRANCH_GAIN` to the power of its layers that are not depthwise: 1.2 and 1.44 for the two branches of
    ShuffleNetV2's units, as in the authors' code. A way that goes on into another one (the reused features of a
    DenseNet) is a shortcut and stays. What leads from a concatenation to a last layer counts as a branch.

    Args:
        run: What was seen; norms are `MimicNorm2d` by now.
        lasts: The last layers.
    """
    scales: dict[MimicNorm2d, float] = {}
    for ways in run.concatenations:
        shared = frozenset.intersection(*(way.calls for way in ways))
        parted = max((run.dense_at[call] for call in shared), default=0)
        for way in ways:
            goes_on = any(other is not way and way.calls <= other.calls for other in ways)
            if isinstance(way.end, MimicNorm2d) and not goes_on:
                scales[way.end] = BRANCH_GAIN ** min(way.dense - parted, way.since)
    for layer in lasts:
        way = run.read_by.get(layer, Seen(0))
        if isinstance(way.end, MimicNorm2d) and way.concatenated:
            scales[way.end] = BRANCH_GAIN**way.since
    return scales


def layers_with_norms(model: nn.Module, forward: Callable[[], object]) -> list[Layer]:
    """Return the convolutions and linear layers right in front of a norm, in the order in which ``forward()`` runs."""
    run = observe(model, forward)
    with_norms = set(run.layer_before.values())
    return [layer for layer in dict.fromkeys(run.order) if layer in with_norms]
