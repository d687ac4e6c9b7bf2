"""`convert`: from a network with batch norms to one with MimicNorm, ready to be trained from scratch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import torch
from torch import nn

from repapq_plugin.core.modules import replace_modules
from repapq_plugin.mimicnorm.initialise import initialise_weights
from repapq_plugin.mimicnorm.layers import LastBatchNorm, MimicNorm2d
from repapq_plugin.mimicnorm.recipe import RecipeLike, find_recipe
from repapq_plugin.mimicnorm.structure import branch_scales, concatenation_scales, last_layer, observe
from repapq_plugin.mimicnorm.weight_mean import Layer
from repapq_plugin.reparam.norms import tail_of

B = TypeVar("B")


@dataclass(frozen=True)
class Conversion:
    """A converted network and what was done to it.

    Args:
        model: The network; a copy.
        replaced: Module paths of the norms that are gone.
        residual: Paths among them that end a residual, parallel or concatenated branch, with their starting scalar.
        last: Module paths of the last layers, which a `LastBatchNorm` follows now.
        kept: Norms left alone: the layer in front of them is frozen, or they do not run at inference (auxiliary heads).
    """

    model: nn.Module
    replaced: tuple[str, ...]
    residual: Mapping[str, float]
    last: tuple[str, ...]
    kept: tuple[str, ...]


def convert(
    model: nn.Module,
    example: B,
    *,
    forward_fn: Callable[[nn.Module, B], object] | None = None,
    last: str | None = None,
    initialise: bool = True,
    recipe: RecipeLike = "default",
) -> Conversion:
    """Replace every batch norm that runs in a copy of ``model`` by MimicNorm.

    Train what comes out with `WeightMean` attached to its optimizer, or after `parametrize_weight_mean`. At
    deployment everything merges: biases and scalars into the layers in front of them, branches by addition, the last
    norm into the last layer; `quantize_model` does so by itself.

    Args:
        model: A network with batch norms; not changed.
        example: A batch of real or random samples; it shows how the network is put together, and how large
            activations are.
        forward_fn: ``forward_fn(model, example)`` runs it; default: ``model(example)``.
        last: Module path of the last layer, if the network returns something else than that layer's output.
        initialise: Draw new weights. False keeps them, for what was trained with MimicNorm before.
        recipe: ``"default"``, ``"authors"``, the choices that differ, or a `Recipe`; `WeightMean` has to be given the
            same, and the optimizer is made by `parameter_groups`.

    Raises:
        ConfigError: The last layer cannot be found, a module is lazy, or there is no such recipe.
    """
    chosen = find_recipe(recipe)
    converted = copy.deepcopy(model)
    forward = forward_fn or _call
    last_layer(converted, observe(converted, lambda: forward(converted, example)), last)  # an error before any work
    replaced, kept = replace_batch_norms(converted, example, forward_fn=forward_fn)
    finished = finish(converted, example, forward_fn=forward_fn, last=last, initialise=initialise, recipe=chosen)
    return replace(finished, replaced=replaced, kept=kept)


def replace_batch_norms(
    model: nn.Module, example: B, *, forward_fn: Callable[[nn.Module, B], object] | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Put a `MimicNorm2d`, in place, where a batch norm stands; its bias parameter goes on at zero.

    Args:
        model: The network; changed.
        example: A batch, as in `convert`.
        forward_fn: Runs it, as in `convert`.

    Returns:
        Module paths of the norms that are gone, and of those kept: the layer in front of them is frozen, or they do
        not run at inference.
    """
    forward = forward_fn or _call
    names = {module: name for name, module in model.named_modules()}
    layer_before = {
        norm: layer
        for norm, layer in observe(model, lambda: forward(model, example)).layer_before.items()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm)
    }
    gone = [norm for norm, layer in layer_before.items() if layer is None or not _frozen(layer)]
    replacements: dict[nn.Module, nn.Module] = {norm: _mimic(norm, layer_before[norm]) for norm in gone}
    replace_modules(model, replacements)
    kept = [
        name
        for module, name in names.items()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module not in replacements
    ]
    return tuple(names[norm] for norm in gone), tuple(kept)


def _mimic(norm: nn.modules.batchnorm._BatchNorm, layer: Layer | None) -> nn.Module:
    """Return what stands in the place of a norm behind ``layer``."""
    new = MimicNorm2d(norm.num_features, bias=layer is None or layer.bias is None)
    if new.bias is not None and isinstance(norm.bias, nn.Parameter):
        new.bias = norm.bias  # an optimizer knows it already
        nn.init.zeros_(new.bias)
    # Some norms carry their own activation.
    whole = nn.Sequential(new, *tail_of(norm)) if tail_of(norm) else new
    return whole.to(_device_of(norm, layer)).train(norm.training)


def finish(
    model: nn.Module,
    example: B,
    *,
    forward_fn: Callable[[nn.Module, B], object] | None = None,
    last: str | Sequence[str] | None = None,
    initialise: bool = True,
    recipe: RecipeLike = "default",
) -> Conversion:
    """Finish, in place, a network that was built with `MimicNorm2d`: branch scalars, the last norm, new weights.

    Args:
        model: The network; changed.
        example: A batch, as in `convert`.
        forward_fn: Runs it, as in `convert`.
        last: Module paths of the layers that a `LastBatchNorm` is to follow; default: the one that the network
            returns the output of.
        initialise: Draw new weights.
        recipe: As in `convert`.

    Raises:
        ConfigError: The last layer cannot be found, a module is lazy, or there is no such recipe.
    """
    chosen_recipe = find_recipe(recipe)
    forward = forward_fn or _call
    names = {module: name for name, module in model.named_modules()}
    run = observe(model, lambda: forward(model, example))
    chosen = [last] if last is None or isinstance(last, str) else list(last)
    lasts = [last_layer(model, run, name) for name in chosen]
    scales = branch_scales(run)
    if chosen_recipe.concatenated:
        scales = concatenation_scales(run, lasts) | scales
    for norm, start in scales.items():
        norm.scale = nn.Parameter(next(model.parameters()).new_tensor([start]))
    replacements: dict[nn.Module, nn.Module] = {}
    for layer in lasts:
        last_norm = LastBatchNorm(layer.weight.shape[0]).to(layer.weight.device).train(layer.training)
        replacements[layer] = nn.Sequential(layer, last_norm)
    replace_modules(model, replacements)
    if initialise:
        initialise_weights(model, [layer for layer in run.order if not _frozen(layer)], forward, example, chosen_recipe)
    return Conversion(
        model, (), {names[norm]: start for norm, start in scales.items()}, tuple(names[layer] for layer in lasts), ()
    )


def _call(network: nn.Module, batch: object) -> object:
    return cast(object, network(batch))


def _device_of(norm: nn.modules.batchnorm._BatchNorm, layer: Layer | None) -> torch.device:
    known = (None if layer is None else layer.weight, norm.running_mean, norm.weight)
    return next((tensor.device for tensor in known if tensor is not None), torch.device("cpu"))


def _frozen(layer: Layer) -> bool:
    return not layer.weight.requires_grad
