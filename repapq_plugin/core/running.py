"""Run a model as at inference, and read the tensors of whatever it returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run a model as at inference; every module's mode comes back afterwards.

    The flags are set one by one because some toolboxes' own ``train`` and ``eval`` do more than that.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def tensors_of(output: Any) -> list[Tensor]:
    """Collect the tensors of nested sequences, mappings and objects with ``items()``, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping) or callable(getattr(output, "items", None)):
        return [tensor for _, value in output.items() for tensor in tensors_of(value)]
    if isinstance(output, list | tuple):
        return [tensor for value in output for tensor in tensors_of(value)]
    return []
