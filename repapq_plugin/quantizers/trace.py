"""What one forward pass tells about a network: call order, calls, shared tensors, first and last layers.

Hooks and autograd only: no tracing of Python code, so any control flow will do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from repapq_plugin.core.hooks import Hooks
from repapq_plugin.core.tensors import floating_tensors
from repapq_plugin.quantizers.layers import QUANTIZABLE

logger = logging.getLogger(__name__)


InputKey = tuple[tuple[int, int], ...]
"""Which tensors a layer read, call after call: their identities, and how often each had been changed in place."""


@dataclass(frozen=True)
class LayerTrace:
    """One quantizable layer as the network calls it.

    Args:
        name: Module path.
        calls: Calls in one forward pass.
        input_key: The same for layers that read the very same tensors.
        first: Reads a tensor that no quantizable layer produced.
        last: Its output reaches the network's output through no other quantizable layer.
    """

    name: str
    calls: int
    input_key: InputKey
    first: bool
    last: bool

    @property
    def at_an_end(self) -> bool:
        """Whether it is a first or a last layer."""
        return self.first or self.last


@dataclass(frozen=True)
class ModuleTrace:
    """One module as the network calls it: how often, and whether always one tensor in, one out."""

    calls: int
    tensor_to_tensor: bool


@dataclass(frozen=True)
class Trace:
    """Layers by name in the order of their first call, and all modules by name."""

    layers: dict[str, LayerTrace]
    modules: dict[str, ModuleTrace]


@contextmanager
def only_weights_require_grad(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """Let gradients reach the given weights and no other parameter, then restore."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def trace_network(model: nn.Module, run: Callable[[], object]) -> Trace:
    """Watch one forward pass of ``model``, which ``run()`` makes.

    Each layer's input is cut from the graph, so a layer whose weight the output still depends on
    is a last one; a layer whose input needed no gradient is a first one.
    """
    layers: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, QUANTIZABLE)
    }
    names = {module: name for name, module in layers.items()}
    weights = {name: cast(nn.Parameter, layer.weight) for name, layer in layers.items()}
    # Kept alive, so that identities stay unique.
    inputs: dict[str, list[tuple[Tensor, int]]] = {}
    first: set[str] = set()
    calls: dict[str, int] = {}
    plain: dict[str, bool] = {}

    def before_layer(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        name, x = names[module], args[0]
        inputs.setdefault(name, []).append((x, x._version))
        if not x.requires_grad:
            first.add(name)
        return (x.detach(), *args[1:])

    def after_any(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
            calls[name] = calls.get(name, 0) + 1
            simple = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor)
            plain[name] = plain.get(name, True) and simple

        return hook

    with Hooks() as hooks, only_weights_require_grad(model, list(weights.values())), torch.enable_grad():
        for module in layers.values():
            hooks.before(module, before_layer)
        for name, module in model.named_modules():
            hooks.after(module, after_any(name), with_kwargs=True)
        outputs = [tensor for tensor in floating_tensors(run()) if tensor.requires_grad]
        last = _last_layers(outputs, {name: weights[name] for name in inputs})
    return Trace(
        layers={
            name: LayerTrace(
                name=name,
                calls=len(seen),
                input_key=tuple((id(x), version) for x, version in seen),
                first=name in first,
                last=name in last,
            )
            for name, seen in inputs.items()
        },
        modules={name: ModuleTrace(count, plain[name]) for name, count in calls.items()},
    )


def _last_layers(outputs: list[Tensor], called: dict[str, nn.Parameter]) -> set[str]:
    """Return which of the ``called`` layers, given by their weights, the outputs depend on."""
    try:
        total = sum((tensor.sum() for tensor in outputs), start=torch.zeros(()))
        gradients = torch.autograd.grad(total, list(called.values()), allow_unused=True)
        return {name for name, gradient in zip(called, gradients, strict=True) if gradient is not None}
    except RuntimeError as error:
        logger.warning("Last layers cannot be told from gradients (%s); taking the last one called.", error)
        return set(list(called)[-1:])
