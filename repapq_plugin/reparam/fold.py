"""Fold batch normalisation into the convolution or linear layer in front of it, whatever the host.

Which norm follows which layer is seen by running the model, not read from attribute names: a norm
whose input *is* the very tensor that a layer returned.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from repapq_plugin.core.compare import equal_within
from repapq_plugin.core.hooks import Hooks
from repapq_plugin.core.modules import places_of
from repapq_plugin.core.running import inference
from repapq_plugin.core.tensors import tensors_of
from repapq_plugin.core.watch import MakersWatch
from repapq_plugin.errors import MergeError
from repapq_plugin.reparam.norms import is_norm, norm_affine, tail_of

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
    scale, shift = norm_affine(bn)
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


class _NormInputs(MakersWatch):
    """Sees, over one run, which layer's output every norm was given, and who else used such an output."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[nn.Module, list[nn.Module | None]] = {}

    def layer_ran(self, layer: nn.Module, _: tuple[object, ...], output: object) -> None:
        self.calls[layer] += 1
        self.made(layer, output)

    def norm_runs(self, norm: nn.Module, args: tuple[object, ...]) -> None:
        x = args[0] if args else None
        self.reading = [x] if isinstance(x, Tensor) else []
        self.given.setdefault(norm, []).append(self.maker_of(x))

    def norm_ran(self, *_: object) -> None:
        self.reading = []

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Layers all of whose outputs went to one norm and nowhere else, the norm being given nothing else."""
        found = []
        for norm, layers in self.given.items():
            layer = layers[0]
            only_one = layer is not None and all(other is layer for other in layers)
            if layer is not None and only_one and self.calls[layer] == len(layers):
                found.append((layer, norm))
        return [(layer, norm) for layer, norm in found if layer not in self.used_elsewhere]


def _outputs(model: nn.Module, run: Callable[[nn.Module], object]) -> list[Tensor]:
    with inference(model):
        return [tensor.detach().clone() for tensor in tensors_of(run(model))]


class _Pair:
    """One layer and the norm behind it, which can be folded and unfolded where they stand."""

    def __init__(self, model: nn.Module, layer: Layer, norm: nn.Module) -> None:
        self.layer, self.norm = layer, norm
        self.before = (layer.weight, layer.bias)
        self.after = [nn.Parameter(value, layer.weight.requires_grad) for value in _folded(layer, norm)]
        tail = tail_of(norm)
        self.rest: nn.Module = nn.Sequential(*tail) if tail else nn.Identity()
        self.rest.training = norm.training
        self.places = places_of(model, norm)

    def fold(self) -> None:
        _put(self.layer, self.after)
        for parent, name in self.places:
            setattr(parent, name, self.rest)

    def unfold(self) -> None:
        _put(self.layer, self.before)
        for parent, name in self.places:
            setattr(parent, name, self.norm)


def _candidates(
    model: nn.Module, run: Callable[[nn.Module], object], refused: Collection[nn.Module]
) -> tuple[list[_Pair], list[Tensor]]:
    """Observe one run: the pairs that look foldable, but for ``refused`` norms, and the model's outputs."""
    watch = _NormInputs()
    with Hooks() as hooks:
        for module in model.modules():
            if isinstance(module, Layer):
                hooks.after(module, watch.layer_ran)
            elif is_norm(module):
                hooks.before(module, watch.norm_runs)
                hooks.after(module, watch.norm_ran)
        with inference(model):
            with watch:
                result = run(model)
            watch.note_use(result)
            outputs = [tensor.detach().clone() for tensor in tensors_of(result)]
    pairs = []
    with torch.no_grad():
        for layer, norm in watch.pairs():
            try:
                if "weight" in layer._parameters and norm not in refused:
                    pairs.append(_Pair(model, _foldable(layer), norm))
            except MergeError as failure:
                logger.warning("A norm stays where it is: %s", failure)
    return pairs, outputs


def fold_conv_norm_pairs(
    model: nn.Module, run: Callable[[nn.Module], object], *, inplace: bool = True
) -> list[tuple[str, str]]:
    """Fold every norm into the layer whose output it normalises, whatever framework built them.

    A pair counts when the norm was only ever given the outputs of that one layer, and these went
    nowhere else; several norms in a row fold one after the other. The folded model is run again; if
    its outputs differ (a layer that does more with its weights than others), the guilty pairs are
    found by halving and stay as they were. A folded norm is replaced, under its own name, by
    ``nn.Identity`` or by the activation that it carried itself.

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
    model = model if inplace else copy.deepcopy(model)
    names = {module: name for name, module in model.named_modules()}
    found: list[tuple[str, str]] = []
    refused: set[nn.Module] = set()
    while True:  # behind a norm that was folded another one may follow
        pairs, wanted = _candidates(model, run, refused)
        if pairs and not wanted:
            raise MergeError("run(model) returned no tensor to compare; return the network's raw output tensors.")
        folded = _fold_what_stays_equal(model, run, pairs, wanted)
        found += [(names[pair.layer], names[pair.norm]) for pair in folded]
        for pair in pairs:
            if pair not in folded:
                refused.add(pair.norm)
                logger.warning(
                    "%s stays a norm: folding it into %s changes the model's output.",
                    names[pair.norm],
                    names[pair.layer],
                )
        if not folded or not any(is_norm(module) for module in model.modules() if module not in refused):
            return found


def _fold_what_stays_equal(
    model: nn.Module, run: Callable[[nn.Module], object], group: list[_Pair], wanted: list[Tensor]
) -> list[_Pair]:
    """Fold those of ``group``, on top of what is folded already, that leave the model's outputs as ``wanted``."""
    if not group:
        return []
    same = False
    for pair in group:
        pair.fold()
    try:
        same = equal_within(_outputs(model, run), wanted)
    finally:
        if not same:
            for pair in group:
                pair.unfold()
    if same:
        return group
    if len(group) == 1:
        return []
    middle = len(group) // 2
    halves = (group[:middle], group[middle:])
    return [pair for half in halves for pair in _fold_what_stays_equal(model, run, half, wanted)]


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
