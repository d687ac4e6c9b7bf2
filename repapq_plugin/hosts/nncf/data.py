"""Calibration batches from what `nncf.quantize` takes: an ``nncf.Dataset``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import cast

import nncf
import torch
from torch import Tensor, nn

from repapq_plugin.core.copies import own_batch
from repapq_plugin.core.running import Batch
from repapq_plugin.core.tensors import floating_tensors
from repapq_plugin.errors import CalibrationError, ConfigError

BATCH = 32
"""Samples that are calibrated together; items of fewer are joined (our choice)."""

_SAME = 1e-4


def forward(model: nn.Module, item: Batch) -> object:
    """Run ``model`` on an item of a dataset the way NNCF does: a dict of keywords, a tuple of arguments, or one."""
    if isinstance(item, dict):
        return model(**item)
    if isinstance(item, tuple):
        return model(*item)
    return model(item)


def calibration_items(dataset: nncf.Dataset, subset_size: int) -> list[Batch]:
    """Return the first ``subset_size`` items of a dataset.

    Raises:
        ConfigError: It is no ``nncf.Dataset``, or ``subset_size`` is no whole number of at least 1.
        CalibrationError: It holds no item.
    """
    if not isinstance(dataset, nncf.Dataset):
        raise ConfigError(
            f"calibration_dataset={type(dataset).__name__} is not allowed; choose nncf.Dataset(data_source, "
            "transform_func)."
        )
    if isinstance(subset_size, bool) or not isinstance(subset_size, int) or subset_size < 1:
        raise ConfigError(f"subset_size={subset_size!r} is not allowed; choose a whole number of at least 1.")
    items = list(islice(iter(dataset.get_inference_data()), subset_size))
    if not items:
        raise CalibrationError("calibration_dataset holds no item; give nncf.Dataset a source of some hundred samples.")
    return items


@torch.no_grad()
def check_items(model: nn.Module, items: Sequence[Batch]) -> None:
    """Run the model on the first item, and on one of every other shape.

    Raises:
        CalibrationError: It cannot be run; the message names the item and its shapes.
    """
    seen: set[str] = set()
    for index, item in enumerate(items):
        shapes = described(item)
        if shapes in seen:
            continue
        seen.add(shapes)
        try:
            forward(model, item)
        except Exception as error:  # whatever the network's own code raises
            raise CalibrationError(
                f"Item {index} of calibration_dataset, {shapes}, cannot be run: {type(error).__name__}: {error} "
                "Give items as the model's forward takes them, or nncf.Dataset a transform_func that makes them so."
            ) from error


def described(item: Batch) -> str:
    """Return types and shapes of an item, for messages."""
    if isinstance(item, Tensor):
        return f"{str(item.dtype).removeprefix('torch.')} {tuple(item.shape)}"
    if isinstance(item, Mapping):
        return "{" + ", ".join(f"{key}: {described(value)}" for key, value in item.items()) + "}"
    if isinstance(item, tuple | list):
        return "(" + ", ".join(described(value) for value in item) + ")"
    return type(item).__name__


@torch.no_grad()
def joined(model: nn.Module, items: Sequence[Batch], size: int = BATCH) -> Sequence[Batch]:
    """Join small items into batches of about ``size`` samples, if the model treats samples one by one.

    Learning from single images takes as many steps and sees less in each. Items are joined along their first axis
    where all of their tensors agree in the others; that the first axis is one of samples is proven on two items.

    Args:
        model: The float network.
        items: Items that it runs on.
        size: Samples to join.

    Returns:
        The items, as they are if they cannot be joined.
    """
    if len(items) < 2 or _samples(items[0]) >= size or not _independent(model, items[0], items[1]):
        return items
    batches: list[Batch] = []
    group: list[Batch] = []
    for item in items:
        if group and (_kind(item) != _kind(group[0]) or sum(map(_samples, group)) >= size):
            batches.append(_concatenated(group))
            group = []
        group.append(item)
    return [*batches, _concatenated(group)]


def _samples(item: Batch) -> int:
    tensors = floating_tensors(item)
    return tensors[0].shape[0] if tensors and tensors[0].dim() else 0


def _kind(item: Batch) -> str:
    """What items must share to be joined: structure, dtypes and all axes but the first."""
    if isinstance(item, Tensor):
        return f"{item.dtype}{tuple(item.shape[1:])}" if item.dim() else f"scalar {item.item()}"
    if isinstance(item, Mapping):
        return "{" + ",".join(f"{key}:{_kind(value)}" for key, value in item.items()) + "}"
    if isinstance(item, tuple | list):
        return type(item).__name__ + "(" + ",".join(_kind(value) for value in item) + ")"
    return repr(item)


def _concatenated(items: list[Batch]) -> Batch:
    first = items[0]
    if len(items) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(cast("list[Tensor]", items)) if first.dim() else first
    if isinstance(first, Mapping):
        mappings = cast("list[Mapping[object, Batch]]", items)
        return {key: _concatenated([item[key] for item in mappings]) for key in first}
    if isinstance(first, tuple | list):
        rows = cast("list[tuple[Batch, ...]]", items)
        return type(first)(_concatenated(list(values)) for values in zip(*rows, strict=True))
    return first


def _independent(model: nn.Module, one: Batch, other: Batch) -> bool:
    """Whether two items joined give what each gives alone."""
    if _kind(one) != _kind(other) or not _samples(one):
        return False
    together = floating_tensors(forward(model, own_batch(_concatenated([one, other]))))
    alone = (floating_tensors(forward(model, own_batch(item))) for item in (one, other))
    apart = list(zip(*alone, strict=True))
    if len(together) != len(apart) or not together:
        return False
    for both, (first, second) in zip(together, apart, strict=True):
        if not first.dim() or both.shape != (first.shape[0] + second.shape[0], *first.shape[1:]):
            return False
        wanted = torch.cat([first, second])
        if wanted.numel() and float((both - wanted).abs().max()) > _SAME * float(wanted.abs().max()):
            return False
    return True
