"""What one forward pass tells about a network: call order, calls, shared tensors, first and last layers.

Hooks and autograd only: no tracing of Python code, so any control flow will do.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from repapq_plugin.core.hooks import Hooks, other_forwards
from repapq_plugin.core.running import frozen, is_out_of_memory
from repapq_plugin.core.tensors import change_first_tensor, floating_tensors, version_of
from repapq_plugin.errors import CalibrationError
from repapq_plugin.quantizers.layers import QUANTIZABLE
from repapq_plugin.quantizers.own_forward import Arguments, reason_against

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


BYPASSED = "its weight is read without calling it, in a pass with gradients or in one without"
WRITTEN = "a forward pass writes its weight"


@dataclass(frozen=True)
class ModuleTrace:
    """One module as the network calls it: how often, and whether always one tensor in, one out."""

    calls: int
    tensor_to_tensor: bool


@dataclass(frozen=True)
class Trace:
    """Layers by name in the order of their first call, all modules by name, and why layers cannot be quantized."""

    layers: dict[str, LayerTrace]
    modules: dict[str, ModuleTrace]
    unfit: dict[str, str] = field(default_factory=dict)


@contextmanager
def only_weights_require_grad(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """Let gradients reach the given weights and no other parameter, then restore."""
    with frozen(model):
        for weight in weights:
            weight.requires_grad_(True)
        yield


def trace_network(model: nn.Module, run: Callable[[], object]) -> Trace:
    """Watch forward passes of ``model``, which ``run()`` makes: with gradients, and without.

    Each layer's input is cut from the graph, so a layer whose weight the output still depends on
    is a last one; a layer whose input needed no gradient is a first one.

    Raises:
        CalibrationError: The network runs without gradients only, or gives an iterator that nobody reads.
    """
    layers: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, QUANTIZABLE)
    }
    names = {module: name for name, module in layers.items()}
    weights = {name: cast(nn.Parameter, layer.weight) for name, layer in layers.items()}
    written_before = {name: _memory_of(layer) for name, layer in layers.items()}
    held = [weight.detach() for weight in weights.values()]  # what replaces one cannot take its place in memory
    # Kept alive, so that identities stay unique.
    inputs: dict[str, list[tuple[Tensor, int]]] = {}
    arguments: dict[str, Arguments] = {}
    first: set[str] = set()
    calls: dict[str, int] = {}
    plain: dict[str, bool] = {}

    def before_layer(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        name = names[module]
        arguments.setdefault(name, (args, kwargs))

        def cut(x: Tensor) -> Tensor:
            inputs.setdefault(name, []).append((x, version_of(x)))
            if not x.requires_grad:
                first.add(name)
            return x.detach()

        return change_first_tensor(args, kwargs, cut)

    def after_any(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
            calls[name] = calls.get(name, 0) + 1
            simple = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor)
            plain[name] = plain.get(name, True) and simple

        return hook

    with Hooks() as hooks, only_weights_require_grad(model, list(weights.values())), torch.enable_grad():
        for module in layers.values():
            hooks.before(module, before_layer, with_kwargs=True)
        for name, module in model.named_modules():
            hooks.after(module, after_any(name), with_kwargs=True)
        returned = _with_gradients(run)
        if isinstance(returned, Iterator) and not inputs:
            raise CalibrationError(
                "The network returns an iterator and runs only as that is read; let forward_fn make a list of it: "
                "forward_fn=lambda model, batch: list(model(batch))."
            )
        outputs = [tensor for tensor in floating_tensors(returned) if tensor.requires_grad]
        last = _last_layers(outputs, {name: weights[name] for name in inputs})
    uncounted = Counter({name: len(seen) for name, seen in inputs.items()})

    def counting(name: str, layer: nn.Module) -> Callable[..., object]:
        own = cast(Callable[..., object], layer.forward)

        def forward(*args: object, **kwargs: object) -> object:
            uncounted.subtract([name])
            return own(*args, **kwargs)

        return forward

    # Hooks would be noticed: without them and without gradients, torch's encoders read weights past the layers.
    with other_forwards({layer: counting(name, layer) for name, layer in layers.items()}), torch.no_grad():
        run()
    unfit = {name: reason for name in inputs if (reason := reason_against(layers[name], arguments[name]))}
    unfit |= {name: BYPASSED for name, count in uncounted.items() if count}
    unfit |= {name: WRITTEN for name in inputs if _memory_of(layers[name]) != written_before[name]}
    held.clear()
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
        unfit=unfit,
    )


def _memory_of(layer: nn.Module) -> tuple[int, int, int] | None:
    """Return which tensor a layer's weight is, where it lies and how often it was changed."""
    weight = layer._parameters.get("weight")
    return None if weight is None else (id(weight), weight.data_ptr(), version_of(weight))


def _with_gradients(run: Callable[[], object]) -> object:
    """Run, and tell a network that does not run with gradients from one that does not run at all."""
    try:
        return run()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        with torch.no_grad():
            run()
        raise CalibrationError(
            f"The network runs without gradients only ({error}). Calibration needs them; write what it computes "
            "without out= and without changing in place what was read."
        ) from error


def _last_layers(outputs: list[Tensor], called: dict[str, nn.Parameter]) -> set[str]:
    """Return which of the ``called`` layers, given by their weights, the outputs depend on."""
    if not called:
        return set()
    try:
        total = sum((tensor.sum() for tensor in outputs), start=torch.zeros(()))
        gradients = torch.autograd.grad(total, list(called.values()), allow_unused=True)
        return {name for name, gradient in zip(called, gradients, strict=True) if gradient is not None}
    except RuntimeError as error:
        logger.warning("Last layers cannot be told from gradients (%s); taking the last one called.", error)
        return set(list(called)[-1:])
