"""Fold batch normalisation into the convolution or linear layer in front of it, whatever the host.

Which norm follows which layer is seen by running the model, not read from attribute names: a norm
whose input *is* the very tensor that a layer returned, or that tensor reshaped or transposed.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from repapq_plugin.core.compare import equal_within, precise, rounding_of
from repapq_plugin.core.copies import plain_copy
from repapq_plugin.core.hooks import Hooks, unseen
from repapq_plugin.core.modules import places_of
from repapq_plugin.core.running import inference
from repapq_plugin.core.tensors import tensors_of
from repapq_plugin.errors import MergeError
from repapq_plugin.reparam.norm_inputs import NormInputs
from repapq_plugin.reparam.norms import is_norm, norm_affine, tail_of
from repapq_plugin.reparam.take_over import carry_attributes

logger = logging.getLogger(__name__)

_TRANSPOSED = nn.modules.conv._ConvTransposeNd

Layer = nn.modules.conv._ConvNd | nn.Linear
"""What a norm can be folded into."""

L = TypeVar("L", bound=nn.Module)


@torch.no_grad()
def fold_batchnorm(conv: L, bn: nn.Module) -> L:
    """Fold a norm into the layer in front of it, in float64, with the norm's own eps.

    Args:
        conv: A convolution, a transposed convolution (also grouped) or a linear layer; left as it is.
        bn: A norm with stored statistics, over as many channels as ``conv`` gives.

    Returns:
        A copy of ``conv``, of its dtype, that computes ``bn(conv(x))`` of inference.

    Raises:
        MergeError: The layer is of another kind, or channels do not match, or statistics are not
            finite, or the norm applies an activation of its own.
    """
    layer = _foldable(conv)
    if "weight" not in layer._parameters:
        raise _not_foldable(conv)
    if tail_of(bn):
        raise MergeError(f"{type(bn).__name__} also applies {tail_of(bn)!r}, which cannot be folded.")
    folded = copy.deepcopy(conv)
    _put(folded, [nn.Parameter(value, layer.weight.requires_grad) for value in _folded(layer, bn)])
    return folded


def _not_foldable(module: nn.Module) -> MergeError:
    name = type(module).__name__
    return MergeError(f"A norm cannot be folded into {name}; give a plain convolution or linear layer.")


def _foldable(module: nn.Module) -> Layer:
    if not isinstance(module, Layer):
        raise _not_foldable(module)
    return module


def _put(layer: nn.Module, values: Iterable[Tensor | None]) -> None:
    """Give a layer another weight and bias."""
    for name, value in zip(("weight", "bias"), values, strict=True):
        setattr(layer, name, value)


def _folded(layer: Layer, bn: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``layer`` followed by ``bn``, in the dtype of ``layer``."""
    scale, shift = (value.to(layer.weight.device) for value in norm_affine(bn))
    weight = layer.weight.double()
    groups = layer.groups if isinstance(layer, _TRANSPOSED) else 1
    # A transposed convolution keeps its output channels, within each group, in the second axis.
    channels = weight.shape[1] * groups if isinstance(layer, _TRANSPOSED) else weight.shape[0]
    if channels != len(scale):
        raise MergeError(f"A norm over {len(scale)} channels cannot be folded into a layer that gives {channels}.")
    taps = [1] * (weight.dim() - 2)
    if isinstance(layer, _TRANSPOSED):
        grouped = weight.reshape(groups, -1, *weight.shape[1:]) * scale.reshape(groups, 1, -1, *taps)
        weight = grouped.flatten(0, 1)
    else:
        weight = weight * scale.reshape(-1, 1, *taps)
    bias = shift if layer.bias is None else scale * layer.bias.double() + shift
    return weight.to(layer.weight.dtype), bias.to(layer.weight.dtype)


class _Pair:
    """One layer and the norm behind it, which can be folded and unfolded where they stand."""

    def __init__(self, model: nn.Module, layer: Layer, norm: nn.Module) -> None:
        self.layer, self.norm = layer, norm
        self.before = (layer.weight, layer.bias)
        self.after = [nn.Parameter(value, layer.weight.requires_grad) for value in _folded(layer, norm)]
        tail = tail_of(norm)
        self.rest: nn.Module = nn.Sequential(*tail) if tail else nn.Identity()
        self.rest.training = norm.training
        carry_attributes(norm, self.rest)
        self.places = places_of(model, norm)

    @property
    def magnitude(self) -> float:
        """The largest bias that folding made: values that are far from zero before they are shifted round coarsely."""
        return max((float(value.abs().max()) for value in self.after[1:] if value.numel()), default=0.0)

    def fold(self) -> None:
        _put(self.layer, self.after)
        for parent, name in self.places:
            setattr(parent, name, self.rest)

    def unfold(self) -> None:
        _put(self.layer, self.before)
        for parent, name in self.places:
            setattr(parent, name, self.norm)


@dataclass(frozen=True)
class Folding:
    """What became of the norms of a model.

    Args:
        pairs: Names of layer and norm of each folded pair.
        kept: Why each other norm stays, by name.
    """

    pairs: list[tuple[str, str]] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)


def _normalises(module: nn.Module) -> bool:
    return is_norm(module) or isinstance(module, nn.modules.batchnorm._NormBase)


class _Folder:
    """Folds norms of one model, one set of pairs after the other.

    Each pair is judged by its own output, on the very inputs that it has in the float network: once norms are folded,
    everything behind a pair goes on with what the norm gave before. Float32 rounding of one pair then meets no other
    one, and no choice that the network makes (a detector's best queries) that could make much of it. What the network
    returns has to stay the same all the same: it changes where something else reads a weight or a norm.
    """

    def __init__(self, model: nn.Module, run: Callable[[nn.Module], object]) -> None:
        self.model, self.run = model, run
        self.names = {module: name for name, module in model.named_modules()}
        self.refused: dict[nn.Module, str] = {}
        self.alone: dict[nn.Module, str] = {}
        self._given: dict[nn.Module, list[Tensor]] = {}

    def candidates(self) -> tuple[list[_Pair], list[Tensor]]:
        """Observe one run: the pairs that look foldable, but for refused norms, and the model's outputs."""
        watch = NormInputs()
        self._given = {}
        with Hooks() as hooks:
            for module in self.model.modules():
                if isinstance(module, Layer):
                    hooks.after(module, watch.layer_ran, first=True)
                elif _normalises(module):
                    hooks.before(module, watch.norm_runs, with_kwargs=True)
                    hooks.after(module, watch.norm_ran)
                    hooks.after(module, self._norm_gave)
            with inference(self.model):
                with watch:
                    result = self.run(self.model)
                watch.note_use(result)
                outputs = [tensor.detach().clone() for tensor in tensors_of(result)]
        pairs = []
        self.alone = dict.fromkeys(watch.given, "its input is not the output of one layer that nothing else reads")
        for layer, norm in watch.pairs():
            del self.alone[norm]
            if norm not in self.refused and (pair := self._pair(layer, norm)) is not None:
                pairs.append(pair)
        return pairs, outputs

    def _norm_gave(self, norm: nn.Module, _: object, output: object) -> None:
        with unseen():
            self._given.setdefault(norm, []).extend(tensor.detach().clone() for tensor in tensors_of(output))

    @torch.no_grad()
    def _pair(self, layer: nn.Module, norm: nn.Module) -> _Pair | None:
        try:
            if "weight" not in layer._parameters:
                raise _not_foldable(layer)
            return _Pair(self.model, _foldable(layer), norm)
        except MergeError as failure:
            logger.warning("%s stays a norm: %s", self.names[norm], failure)
            self.refused[norm] = str(failure)
            return None

    def fold_what_stays_equal(self, group: list[_Pair], wanted: list[Tensor]) -> list[_Pair]:
        """Fold those of ``group``, on top of what is folded already, that leave everything as it was.

        Args:
            group: Pairs; each is folded afterwards, or as it was.
            wanted: The model's outputs.

        Returns:
            The folded ones.
        """
        same, differing = False, group
        for pair in group:
            pair.fold()
        try:
            differing, outputs = self._judged(group)
            tolerance = rounding_of([*wanted, *self.model.parameters()])
            same = not differing and equal_within(outputs, wanted, tolerance)
        finally:
            if not same:
                for pair in group:
                    pair.unfold()
        if same or not group:
            return group
        if differing:
            return self.fold_what_stays_equal([pair for pair in group if pair not in differing], wanted)
        if len(group) == 1:
            return []
        middle = len(group) // 2
        halves = (group[:middle], group[middle:])
        return [pair for half in halves for pair in self.fold_what_stays_equal(half, wanted)]

    def _judged(self, group: list[_Pair]) -> tuple[list[_Pair], list[Tensor]]:
        """Run the model with the pairs of ``group`` folded; return those that gave something else, and its outputs."""
        left = {pair: list(self._given[pair.norm]) for pair in group}
        differing: list[_Pair] = []

        def judge(pair: _Pair) -> Callable[..., object]:
            tolerance = rounding_of([*left[pair], *pair.after])

            def hook(_: nn.Module, args: object, output: object) -> object:
                with unseen():
                    if isinstance(output, Tensor) and left[pair]:
                        before = left[pair].pop(0)
                        if not equal_within([output], [before], tolerance, terms=pair.magnitude):
                            differing.append(pair)
                        return before.clone()
                    differing.append(pair)
                    return None

            return hook

        with Hooks() as hooks:
            for pair in group:
                hooks.after(pair.rest, judge(pair))
            with inference(self.model):
                outputs = [tensor.detach().clone() for tensor in tensors_of(self.run(self.model))]
        differing += [pair for pair, calls in left.items() if calls]
        return differing, outputs

    def refuse(self, pair: _Pair) -> None:
        """Keep a norm that cannot be folded into the layer in front of it."""
        layer = self.names[pair.layer]
        self.refused[pair.norm] = f"folding it into {layer} changes the model's output"
        logger.warning("%s stays a norm: folding it into %s changes the model's output.", self.names[pair.norm], layer)


def fold_conv_norm_pairs(
    model: nn.Module, run: Callable[[nn.Module], object], *, inplace: bool = True
) -> list[tuple[str, str]]:
    """Fold every norm into the layer whose output it normalises, whatever framework built them.

    A pair counts when the norm was only ever given the outputs of that one layer, perhaps reshaped or
    transposed, and these went nowhere else; several norms in a row fold one after the other. The folded
    model is run again; if its outputs differ (a layer that does more with its weights than others), the
    guilty pairs are found by halving and stay as they were. A folded norm is replaced, under its own
    name, by ``nn.Identity`` or by the activation that it carried itself. `fold_norms` does the same and
    tells why other norms stay.

    Args:
        model: A model; run as at inference, its modes come back.
        run: Runs the model it is given on sample data and returns its raw output tensors, nested in
            lists, tuples or mappings; called several times, and has to give the same each time.
        inplace: False only looks: a copy is folded, ``model`` stays as it is.

    Returns:
        Names of layer and norm of each folded pair.

    Raises:
        MergeError: ``run`` returned no tensor, so that nothing can be compared.
    """
    return fold_norms(model, run, inplace=inplace).pairs


@precise()
def fold_norms(model: nn.Module, run: Callable[[nn.Module], object], *, inplace: bool = True) -> Folding:
    """Fold norms as `fold_conv_norm_pairs` does, and tell why others stay.

    Args:
        model: See `fold_conv_norm_pairs`.
        run: See `fold_conv_norm_pairs`.
        inplace: See `fold_conv_norm_pairs`.

    Raises:
        MergeError: ``run`` returned no tensor, so that nothing can be compared.
    """
    model = model if inplace else plain_copy(model)
    folder = _Folder(model, run)
    names = folder.names
    found: list[tuple[str, str]] = []
    while True:  # behind a norm that was folded another one may follow
        pairs, wanted = folder.candidates()
        if pairs and not wanted:
            raise MergeError("run(model) returned no tensor to compare; return the network's raw output tensors.")
        folded = folder.fold_what_stays_equal(pairs, wanted)
        found += [(names[pair.layer], names[pair.norm]) for pair in folded]
        for pair in pairs:
            if pair not in folded:
                folder.refuse(pair)
        if not folded or not any(is_norm(module) for module in model.modules() if module not in folder.refused):
            kept = folder.alone | folder.refused
            return Folding(found, {names[norm]: reason for norm, reason in kept.items()})


def fold_named_pairs(model: nn.Module, pairs: Iterable[tuple[str, str]]) -> None:
    """Fold in place the pairs that `fold_conv_norm_pairs` once found in a model like this one.

    Args:
        model: A model; changed.
        pairs: Names of layer and norm.

    Raises:
        AttributeError: A name is not there.
        MergeError: A pair does not fit together.
    """
    modules = dict(model.named_modules())
    with torch.no_grad():
        for layer, norm in pairs:
            if layer not in modules or norm not in modules:
                raise AttributeError(f"the model has no pair ({layer!r}, {norm!r}) to fold")
            _Pair(model, _foldable(modules[layer]), modules[norm]).fold()
