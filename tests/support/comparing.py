"""Whether two runs, or a network before and after, are the same to the last bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from repapq_plugin.core.tensors import floating_tensors

Numbers = dict[str, Tensor]
"""A network's parameters and buffers by name."""


def outputs_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return floating_tensors(model(x.clone()))


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def numbers(model: nn.Module) -> Numbers:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def equal_numbers(one: Numbers, other: Numbers) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def hooks_of(model: nn.Module) -> list[object]:
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the largest difference of learned tensors, each relative to its largest value."""
    assert one.keys() == other.keys()
    return max(
        float((one[key] - other[key]).abs().max() / one[key].abs().max().clamp_min(1e-12))
        for key in one
        if one[key].is_floating_point() and one[key].numel()
    )
