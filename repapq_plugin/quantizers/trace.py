"""What one forward pass tells about a network: call order, calls, shared tensors, first and last layers.

Hooks and autograd only: no tracing of Python code, so any control flow will do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from repapq_plugin.quantizers.layers import QUANTIZABLE

logger = logging.getLogger(__name__)


def flatten_tensors(value: Any) -> list[Tensor]:
    """Return the floating tensors of nested tuples, lists, dicts and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in flatten_tensors(item)]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in flatten_tensors(item)]
    if hasattr(value, "__dataclass_fields__"):
        return [tensor for key in value.__dataclass_fields__ for tensor in flatten_tensors(getattr(value, key))]
    return []


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
    input_key: tuple[tuple[int, int], ...]
    first: bool
    last: bool


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
def hooked(handles: list[Any]) -> Iterator[None]:
    """Remove the hooks whose handles are given, however the block ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def unseen() -> AbstractContextManager[Any]:
    """Keep what a hook computes from whoever watches a network's functions (`torch.overrides` modes)."""
    return cast(AbstractContextManager[Any], torch._C.DisableTorchFunction())


@contextmanager
def only_weights_require_grad(model: nn.Module, weights: list[Tensor]) -> Iterator[None]:
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


def trace_network(model: nn.Module, run: Callable[[], Any]) -> Trace:
    """Watch one forward pass of ``model``, which ``run()`` makes.

    Each layer's input is cut from the graph, so a layer whose weight the output still depends on
    is a last one; a layer whose input needed no gradient is a first one.
    """
    layers: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, QUANTIZABLE)
    }
    names = {module: name for name, module in layers.items()}
    inputs: dict[str, list[Tensor]] = {}
    versions: dict[str, list[int]] = {}
    first: set[str] = set()
    calls: dict[str, int] = {}
    plain: dict[str, bool] = {}

    def before_layer(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        name, x = names[module], args[0]
        inputs.setdefault(name, []).append(x)  # kept alive, so that identities stay unique
        versions.setdefault(name, []).append(x._version)
        if not x.requires_grad:
            first.add(name)
        return (x.detach(), *args[1:])

    def after_any(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            simple = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor)
            plain[name] = plain.get(name, True) and simple

        return hook

    handles = [module.register_forward_pre_hook(before_layer) for module in layers.values()]
    handles += [
        module.register_forward_hook(after_any(name), with_kwargs=True) for name, module in model.named_modules()
    ]
    with ExitStack() as stack:
        stack.enter_context(hooked(handles))
        weights = [cast(Tensor, module.weight) for module in layers.values()]
        stack.enter_context(only_weights_require_grad(model, weights))
        with torch.enable_grad():
            outputs = [tensor for tensor in flatten_tensors(run()) if tensor.requires_grad]
            last = _last_layers(outputs, layers, list(inputs))
    return Trace(
        layers={
            name: LayerTrace(
                name=name,
                calls=len(seen),
                input_key=tuple((id(x), version) for x, version in zip(seen, versions[name], strict=True)),
                first=name in first,
                last=name in last,
            )
            for name, seen in inputs.items()
        },
        modules={name: ModuleTrace(count, plain[name]) for name, count in calls.items()},
    )


def _last_layers(outputs: list[Tensor], layers: dict[str, nn.Module], called: list[str]) -> set[str]:
    try:
        total = sum((tensor.sum() for tensor in outputs), start=torch.zeros(()))
        weights = [cast(Tensor, layers[name].weight) for name in called]
        gradients = torch.autograd.grad(total, weights, allow_unused=True)
        return {name for name, gradient in zip(called, gradients, strict=True) if gradient is not None}
    except RuntimeError as error:
        logger.warning("Last layers cannot be told from gradients (%s); taking the last one called.", error)
        return set(called[-1:])
