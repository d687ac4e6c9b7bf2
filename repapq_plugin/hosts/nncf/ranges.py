"""Starting ranges of NNCF's quantizers at the bits that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from nncf.torch.quantization.layers import BaseQuantizer, SymmetricQuantizer
from torch import Tensor, nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.losses import mae_loss
from repapq_plugin.core.quant_primitives import fake_quantize
from repapq_plugin.errors import CalibrationError
from repapq_plugin.hosts.nncf.placement import PlacedWeight, Placement
from repapq_plugin.hosts.nncf.quantizers import channel_axis, observer_for, set_qparams, step_of
from repapq_plugin.method.starting_ranges import AUTO_BATCHES, AUTO_CANDIDATES
from repapq_plugin.observers.base import RangeObserver
from repapq_plugin.quantizers.layers import apply_layer
from repapq_plugin.quantizers.trace import unseen

Qparams = tuple[Tensor, Tensor]


@torch.no_grad()
def set_weight_range(placed: PlacedWeight, config: RepAPQConfig) -> None:
    """Give a weight's quantizer the range that ``config.weight_observer`` finds on its grid."""
    quantizer = placed.quantizer
    observer = observer_for(quantizer, config.weight_observer)
    weight: Tensor = placed.module.weight  # type: ignore[assignment]
    observer(weight.detach())
    set_qparams(quantizer, *observer.calculate_qparams())


@torch.no_grad()
def set_activation_ranges(
    placement: Placement,
    run: Callable[[Any], Any],
    batches: Sequence[Any],
    config: RepAPQConfig,
    advance: Callable[[], None],
) -> None:
    """Observe the unquantized network on every batch and give each activation quantizer its range.

    Quantizers that have a range per channel keep NNCF's.

    Args:
        placement: Where quantizers are; those of activations have their bits.
        run: Makes a forward pass of the network that holds them.
        batches: Calibration batches.
        config: Names the observer.
        advance: Called after each batch.

    Raises:
        CalibrationError: An activation holds NaN or Inf; the message names its place.
    """
    chosen = [placed for placed in placement.activations if channel_axis(placed.quantizer) is None]
    auto = config.activation_observer == "auto"
    names = AUTO_CANDIDATES if auto else (config.activation_observer,)
    extra = {"percentile": config.percentile} if config.activation_observer == "percentile" else {}
    observers: dict[BaseQuantizer, dict[str, RangeObserver]] = {
        placed.quantizer: {name: observer_for(placed.quantizer, name, **extra) for name in names} for placed in chosen
    }
    places = {placed.quantizer: placed.hooks[0] for placed in chosen}

    def observe(quantizer: nn.Module, args: tuple[Any, ...]) -> None:
        with unseen():
            for observer in observers[quantizer].values():
                try:
                    observer(args[0])
                except CalibrationError as error:
                    raise CalibrationError(
                        f"The activation at {places[quantizer]!r} is not finite: {error} Check the checkpoint and "
                        "the calibration data."
                    ) from error

    with not_quantizing(placement.quantizers):
        with ExitStack() as stack:
            for quantizer in observers:
                stack.callback(quantizer.register_forward_pre_hook(observe).remove)
            for batch in batches:
                run(batch)
                advance()
        found = {
            quantizer: {name: observer.calculate_qparams() for name, observer in by_name.items()}
            for quantizer, by_name in observers.items()
            if all(observer.min_val.numel() for observer in by_name.values())
        }
        best = _least_disturbing(placement, found, run, batches[:AUTO_BATCHES]) if auto else {}
    for quantizer, by_name in found.items():
        set_qparams(quantizer, *by_name[best.get(quantizer, names[0])])


def _least_disturbing(
    placement: Placement,
    ranges: Mapping[BaseQuantizer, Mapping[str, Qparams]],
    run: Callable[[Any], Any],
    batches: Sequence[Any],
) -> dict[BaseQuantizer, str]:
    """Return for each quantizer the range that disturbs the layers which read it least.

    A quantizer that no layer reads directly is judged by what it does to its own tensor, squared.
    """
    errors = {quantizer: dict.fromkeys(by_name, 0.0) for quantizer, by_name in ranges.items()}
    read = {quantizer: dict.fromkeys(by_name, 0.0) for quantizer, by_name in ranges.items()}
    layers = {placed.module for placed in placement.weights.values()}
    passed: dict[int, tuple[Tensor, BaseQuantizer]] = {}

    def hats(quantizer: BaseQuantizer, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        for name, (scale, zero_point) in ranges[quantizer].items():
            yield name, fake_quantize(x, scale, zero_point, quantizer.level_low, quantizer.level_high)

    def remember(quantizer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        passed[id(output)] = (output, quantizer)
        with unseen():
            for name, hat in hats(quantizer, output):
                errors[quantizer][name] += float((hat - output).square().mean())

    def compare(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        held = passed.get(id(args[0]))
        if held is None or held[0] is not args[0]:
            return
        with unseen():
            for name, hat in hats(held[1], args[0]):
                weight: Tensor = layer.weight  # type: ignore[assignment]
                read[held[1]][name] += float(mae_loss(apply_layer(layer, hat, weight), output))

    with ExitStack() as stack:
        for quantizer in ranges:
            stack.callback(quantizer.register_forward_hook(remember).remove)
        for layer in layers:
            stack.callback(layer.register_forward_hook(compare).remove)
        for batch in batches:
            run(batch)
            passed.clear()
    best = {}
    for quantizer, by_name in errors.items():
        judged = read[quantizer] if any(read[quantizer].values()) else by_name
        best[quantizer] = min(judged, key=lambda name, of=judged: of[name])  # type: ignore[misc]
    return best


@contextmanager
def not_quantizing(quantizers: Sequence[BaseQuantizer]) -> Iterator[None]:
    """Let quantizers hand values on as they are for a while."""
    before = [(quantizer, quantizer.enabled.clone()) for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            quantizer.enabled.fill_(0)
        yield
    finally:
        for quantizer, enabled in before:
            quantizer.enabled.copy_(enabled)


@torch.no_grad()
def uses_half_range(placed: PlacedWeight) -> bool:
    """Whether NNCF left half of the codes of a weight unused, which keeps 16-bit sums of products from saturating."""
    quantizer = placed.quantizer
    if not isinstance(quantizer, SymmetricQuantizer):
        return False
    weight: Tensor = placed.module.weight  # type: ignore[assignment]
    axis = channel_axis(quantizer)
    largest = weight.abs().max() if axis is None else weight.abs().movedim(axis, 0).flatten(1).amax(1)
    reach = step_of(quantizer).flatten() * quantizer.level_high
    alive = largest.flatten() > 0
    return bool(alive.any()) and bool((reach[alive] > 1.5 * largest.flatten()[alive]).all())
