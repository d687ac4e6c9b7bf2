"""Starting ranges of all weights and activations: what learning sets out from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from repapq_plugin.config import LossName, RepAPQConfig
from repapq_plugin.core import ranks
from repapq_plugin.core.hooks import Hooks, unseen
from repapq_plugin.core.losses import sample_floor, sample_sizes
from repapq_plugin.core.progress import Advance
from repapq_plugin.core.quant_primitives import fake_quantize, powers_around
from repapq_plugin.core.running import Batch
from repapq_plugin.core.tensor_notes import TensorNotes
from repapq_plugin.core.tensors import change_first_tensor, first_tensor
from repapq_plugin.errors import CalibrationError
from repapq_plugin.method.sites import ActivationSite, Quantizer, Sites, WeightSite
from repapq_plugin.observers import RangeObserver
from repapq_plugin.observers.shares import set_apart, settle, unite
from repapq_plugin.policy import activation_observers, observer_arguments
from repapq_plugin.quantizers.layers import weight_of

COMPARED_BATCHES = 2
"""Batches on which ranges are compared (our choice: two suffice for a per-tensor scale)."""

Run = Callable[[Batch], object]
Ranges = Mapping[str, tuple[Tensor, Tensor]]
"""Scale and zero point by the name of the observer that found them."""


@torch.no_grad()
def set_starting_ranges(
    sites: Sites, run: Run, batches: Sequence[Batch], config: RepAPQConfig, advance: Advance
) -> None:
    """Observe the float network on every batch and give each quantizer its scale and zero point.

    Of several ranks each runs its own batches, and all end with the same ranges.

    Quantizers of activations that have a range per channel keep theirs.

    Args:
        sites: Where quantizers are; afterwards all quantize that did before.
        run: Makes a forward pass of the network that holds them.
        batches: Calibration batches.
        config: Names the observers.
        advance: Called after each batch.

    Raises:
        CalibrationError: An activation holds NaN or Inf, and the message says which; or no batch holds a value.
    """
    for weight in sites.weights.values():
        set_weight_range(weight.quantizer, weight_of(weight.layer), config)
    watched = [site for site in sites.activations if site.quantizer.ch_axis is None]
    with not_quantizing(sites.quantizers):
        found = _observe(watched, run, batches, config, advance)
        if watched and not found:
            raise CalibrationError(
                f"No layer read a single value in {ranks.most(len(batches))} calibration batches; give batches that "
                "hold images."
            )
        best = _least_disturbing(sites, found, run, batches[:COMPARED_BATCHES], config.loss)
    for quantizer, ranges in found.items():
        quantizer.set_qparams(*ranges[best[quantizer]])
    ranks.level(sites.ranges())


def set_weight_range(quantizer: Quantizer, weight: Tensor, config: RepAPQConfig) -> None:
    """Give a weight's quantizer the range that ``config.weight_observer`` finds.

    Of the powers of two around a scale, if it must be one, each channel gets the one of the smaller squared error.
    """
    observer = quantizer.observer(config.weight_observer)
    observer(weight.detach())
    scale, zero_point = observer.calculate_qparams()
    if quantizer.power_of_two:
        axis, errors = quantizer.ch_axis, []
        for power in powers_around(scale):
            hat = fake_quantize(weight, power, zero_point, *quantizer.bounds, axis)
            rows = (hat - weight).square()
            errors.append(rows.sum()[None] if axis is None else rows.movedim(axis, 0).flatten(1).sum(1))
        low, high = powers_around(scale)
        scale = torch.where(errors[0] < errors[1], low, high)
    quantizer.set_qparams(scale, zero_point)


@contextmanager
def not_quantizing(quantizers: Sequence[Quantizer]) -> Iterator[None]:
    """Let quantizers hand values on as they are for a while."""
    before = [(quantizer, quantizer.quantizing) for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            quantizer.quantizing = False
        yield
    finally:
        for quantizer, enabled in before:
            quantizer.quantizing = enabled


def _observe(
    watched: Sequence[ActivationSite],
    run: Run,
    batches: Sequence[Batch],
    config: RepAPQConfig,
    advance: Advance,
) -> dict[Quantizer, Ranges]:
    """Return the ranges that each observer found for each quantizer that saw a value."""
    names = activation_observers(config)
    observers: dict[Quantizer, dict[str, RangeObserver]] = {
        site.quantizer: {name: site.quantizer.observer(name, **observer_arguments(name, config)) for name in names}
        for site in watched
    }
    every = [observer for by_name in observers.values() for observer in by_name.values()]
    set_apart(every)

    def observer_of(site: ActivationSite) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def observe(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            try:
                with unseen():
                    for observer in observers[site.quantizer].values():
                        observer(args[0])
            except CalibrationError as error:
                raise CalibrationError(
                    f"{site.where} is not finite: {error} Check the checkpoint and the calibration data."
                ) from error

        return observe

    with Hooks() as hooks:
        for site in watched:
            hooks.before(site.quantizer.module, observer_of(site))
        for index in range(ranks.most(len(batches))):
            if index < len(batches):
                run(batches[index])
            settle(every)
            advance()
    unite(every)
    return {
        quantizer: _allowed(quantizer, {name: observer.calculate_qparams() for name, observer in by_name.items()})
        for quantizer, by_name in observers.items()
        if all(observer.min_val.numel() for observer in by_name.values())
    }


def _allowed(quantizer: Quantizer, ranges: Ranges) -> Ranges:
    """Return ranges, or where a scale must be one, both powers of two around that of each."""
    if not quantizer.power_of_two:
        return ranges
    return {
        f"{name} {side}": (power, zero_point)
        for name, (scale, zero_point) in ranges.items()
        for side, power in zip(("below", "above"), powers_around(scale), strict=True)
    }


def _least_disturbing(
    sites: Sites, found: Mapping[Quantizer, Ranges], run: Run, batches: Sequence[Batch], loss: LossName
) -> dict[Quantizer, str]:
    """Return for each quantizer the name of the range that disturbs the layers which read it least.

    They are judged by the loss that learning has, `relative_loss`, in which each sample counts alike. Absolute errors
    let a range cut off what is large and rare, which a network of 8 bits need not lose. A layer that is called more
    than once in a pass, as the head of a feature pyramid is, is judged by all calls together: what is quiet there
    beside another call does not count as much as that. A quantizer that no layer reads directly is judged by what it
    does to its own tensor.
    """
    if all(len(ranges) == 1 for ranges in found.values()):
        return {quantizer: next(iter(ranges)) for quantizer, ranges in found.items()}
    errors = {quantizer: _Errors(loss, ranges) for quantizer, ranges in found.items()}
    read: set[Quantizer] = set()
    passed: TensorNotes[Quantizer] = TensorNotes()

    def hats(quantizer: Quantizer, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        for name, (scale, zero_point) in found[quantizer].items():
            with unseen():
                hat = fake_quantize(x, scale, zero_point, *quantizer.bounds)
            yield name, hat

    def passes(quantizer: Quantizer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, args, output: passed.put(output, quantizer)

    def compares(site: WeightSite) -> Callable[..., None]:
        def compare(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: Tensor) -> None:
            x = first_tensor(args, kwargs)
            quantizer = passed.get(x)
            if x is None or quantizer is None or not output.numel():
                return
            read.add(quantizer)
            given: dict[str, Tensor] = {}
            for name, hat in hats(quantizer, x):
                changed, keywords = change_first_tensor(args, kwargs, lambda _, hat=hat: hat)  # type: ignore[misc]
                given[name] = site.float_forward(*changed, **keywords)
            errors[quantizer].add(site.name, output, given)

        return compare

    def judges(quantizer: Quantizer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def judge(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.numel():
                return
            given = dict(hats(quantizer, output))
            with unseen():
                errors[quantizer].add("", output, given)

        return judge

    with Hooks() as hooks:
        for quantizer in found:
            hooks.after(quantizer.module, passes(quantizer))
        for site in sites.weights.values():
            hooks.after(site.layer, compares(site), with_kwargs=True, first=True)
        _run_each(run, batches, errors.values())
    everywhere = zip(*ranks.gather([quantizer in read for quantizer in found]), strict=True)
    unread = [quantizer for quantizer, seen in zip(found, everywhere, strict=True) if not any(seen)]
    if unread:
        with Hooks() as hooks:
            for quantizer in unread:
                hooks.after(quantizer.module, judges(quantizer))
            _run_each(run, batches, errors.values())
    return {quantizer: of_quantizer.least() for quantizer, of_quantizer in errors.items()}


def _run_each(run: Run, batches: Sequence[Batch], errors: Collection[_Errors]) -> None:
    """Run batches, and let each one's errors be summed up behind it, over all ranks."""
    for index in range(ranks.most(len(batches))):
        if index < len(batches):
            run(batches[index])
        shares = ranks.gather([of_quantizer.calls for of_quantizer in errors])
        for position, of_quantizer in enumerate(errors):
            of_quantizer.sum_up([of_rank[position] for of_rank in shares])


Calls = dict[str, list[tuple[Tensor, dict[str, Tensor]]]]
"""By reader, call after call: the sizes of what it should return, sample by sample, and of its errors by range."""


class _Errors:
    """How much each of several ranges disturbs what reads a tensor.

    Args:
        loss: What an error is measured by.
        names: Of the ranges.
    """

    def __init__(self, loss: LossName, names: Collection[str]) -> None:
        self._loss, self._totals = loss, dict.fromkeys(names, 0.0)
        self.calls: Calls = {}

    def add(self, reader: str, wanted: Tensor, given: Mapping[str, Tensor]) -> None:
        """Note one call of what reads the tensor: what it should return, and what it returns with each range."""
        sizes = {name: sample_sizes(values - wanted, self._loss) for name, values in given.items()}
        self.calls.setdefault(reader, []).append((sample_sizes(wanted, self._loss), sizes))

    def sum_up(self, shares: Sequence[Calls]) -> None:
        """Add the relative errors of one pass.

        Args:
            shares: The `calls` of each rank.
        """
        for calls in _joined(shares).values():
            loudest = torch.stack([sample_floor(sizes).min() for sizes, _ in calls]).max()
            for sizes, by_name in calls:
                for name, errors in by_name.items():
                    self._totals[name] += float((errors / torch.maximum(sizes, loudest)).mean())
        self.calls = {}

    def least(self) -> str:
        """Return the name of the range that disturbs least."""
        return min(self._totals, key=lambda name: self._totals[name])


def _joined(shares: Sequence[Calls]) -> Calls:
    """Return calls with the samples of all ranks: one call of each rank is one call of all."""
    if len(shares) == 1:
        return shares[0]
    joined: Calls = {}
    for reader in dict.fromkeys(reader for calls in shares for reader in calls):
        of_ranks = [calls[reader] for calls in shares if reader in calls]
        for number in range(max(map(len, of_ranks))):
            parts = [calls[number] for calls in of_ranks if number < len(calls)]
            sizes = torch.cat([part.cpu() for part, _ in parts])
            errors = {name: torch.cat([by_name[name].cpu() for _, by_name in parts]) for name in parts[0][1]}
            joined.setdefault(reader, []).append((sizes, errors))
    return joined
