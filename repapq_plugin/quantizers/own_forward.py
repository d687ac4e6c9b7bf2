"""What a layer's own ``forward`` multiplies: subclasses may pad, scale, standardize or do anything else.

A layer can be quantized if its forward makes one product, of its input (perhaps padded) with its weight and bias. If it
multiplies another tensor that it makes of its weight alone, that tensor can become its weight. Anything else stays
float, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from repapq_plugin.core.hooks import Hooks
from repapq_plugin.core.modules import become, own_class, resign, without_hooks
from repapq_plugin.core.running import inference, is_out_of_memory
from repapq_plugin.core.tensors import change_first_tensor, first_tensor
from repapq_plugin.core.watch import FunctionWatch
from repapq_plugin.quantizers.layers import PRODUCTS, QUANTIZABLE, BakedLayer, output_channels, weight_of

OTHER_PRODUCTS = ("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "__matmul__", "__rmatmul__", "tensordot")
PADDINGS = ("pad", "constant_pad_nd")

PLAIN = {kind.forward for kind in QUANTIZABLE}
"""Forwards that are known to make one product of input, weight and bias."""

PROBES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x * 0.5 + 0.25,
    torch.neg,
    torch.zeros_like,
    lambda x: torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape) + 0.1,
)
"""Inputs made of a layer's own: like it, and of moderate size, as functions may not tell large values apart."""

Arguments = tuple[tuple[object, ...], Mapping[str, object]]
"""Positional and keyword arguments of one call."""


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer runs the forward of torch's own class."""
    kind = own_class(layer)
    return kind.forward in PLAIN and "forward" not in vars(layer) and _conv_forward_is_torchs(kind)


def _conv_forward_is_torchs(kind: type[nn.Module]) -> bool:
    own = getattr(kind, "_conv_forward", None)
    return own is None or any(own is getattr(torchs, "_conv_forward", None) for torchs in QUANTIZABLE)


@dataclass
class Product:
    """One product that a forward made, by its operands."""

    source: Tensor
    weight: Tensor
    bias: Tensor | None


@dataclass
class _Products(FunctionWatch):
    """Notes the products of a forward, and which tensors are its input, perhaps padded."""

    given: Tensor
    products: list[Product] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.inputs = [self.given]

    def after(
        self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object], result: object, note: Any
    ) -> None:
        """See `FunctionWatch`."""
        if name in PRODUCTS:
            names = ("input", "weight", "bias")
            values = {**dict(zip(names, args, strict=False)), **kwargs}
            self.products.append(
                Product(
                    cast(Tensor, values["input"]),
                    cast(Tensor, values["weight"]),
                    cast("Tensor | None", values.get("bias")),
                )
            )
        elif name in OTHER_PRODUCTS:
            self.others.append(name)
        elif name in PADDINGS and args and any(args[0] is known for known in self.inputs):
            self.inputs.append(cast(Tensor, result))


def products_of(layer: nn.Module, arguments: Arguments) -> _Products:
    """Run a layer once, as at inference, and return what it multiplied."""
    args, kwargs = arguments
    given = first_tensor(args, kwargs)
    watch = _Products(torch.zeros(()) if given is None else given)
    with inference(layer), watch:
        layer(*args, **kwargs)
    return watch


def reason_against(layer: nn.Module, arguments: Arguments) -> str:
    """Return why a layer cannot be quantized with its own forward, or an empty text.

    Args:
        layer: A layer of a `QUANTIZABLE` class; left as it is.
        arguments: What it was once called with.
    """
    if layer._parameters.get("weight") is None or "bias" not in layer._parameters:
        return f"weight and bias of {own_class(layer).__name__} are not both parameters of its own"
    if is_plain(layer):
        return ""
    probe = without_hooks(layer)
    if probe._parameters.get("bias") is None:
        weight = weight_of(layer)
        probe._parameters["bias"] = nn.Parameter(weight.new_zeros(output_channels(layer)), requires_grad=False)
    kind = own_class(layer).__name__
    try:
        seen = products_of(probe, arguments)
    except Exception as error:  # whatever the user's forward raises
        if is_out_of_memory(error):
            raise
        return f"the forward of {kind} cannot be run alone with a bias ({type(error).__name__}: {error})"
    if not seen.products and seen.others:
        return f"the forward of {kind} multiplies with {seen.others[0]} instead of a layer's own function"
    if len(seen.products) != 1 or seen.others:
        return f"the forward of {kind} makes {len(seen.products) + len(seen.others)} products instead of one"
    product = seen.products[0]
    if product.weight is not probe._parameters["weight"] and not isinstance(layer, BakedLayer):
        return f"the forward of {kind} multiplies another tensor than its weight"
    if product.bias is not probe._parameters["bias"]:
        return f"the forward of {kind} does not add its bias to the product"
    if not any(product.source is known for known in seen.inputs):
        return f"the forward of {kind} changes its input before it is multiplied"
    return ""


@torch.no_grad()
def bake_weights(model: nn.Module, run: Callable[[], object]) -> tuple[str, ...]:
    """Let layers that multiply a function of their weight have that as their weight, where it is the same function.

    Weight standardization and scaled weights are of this kind. The tensor that is multiplied has to be the same in
    every call and of the weight's shape, and the layer has to give bit for bit what it gave.

    Args:
        model: In evaluation mode; changed in place.
        run: Makes a forward pass of it.

    Returns:
        Module paths of the layers that were changed.
    """
    names = {m: name for name, m in model.named_modules() if isinstance(m, QUANTIZABLE) and not is_plain(m)}
    calls = calls_of(list(names), run)
    return tuple(name for layer, name in names.items() if calls.get(layer) and _bake(layer, calls[layer]))


def calls_of(layers: Sequence[nn.Module], run: Callable[[], object]) -> dict[nn.Module, list[Arguments]]:
    """Return what layers are called with in a run."""
    calls: dict[nn.Module, list[Arguments]] = {}

    def note(layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        calls.setdefault(layer, []).append((args, dict(kwargs)))

    with Hooks() as hooks:
        for layer in layers:
            hooks.before(layer, note, with_kwargs=True)
        run()
    return calls


def baked_layer(layer: nn.Module, made: Tensor) -> BakedLayer:
    """Let a layer multiply ``made`` from now on, in place; a weight that it shares with others is no longer shared.

    Args:
        layer: The layer.
        made: What its own forward makes of its weight; of the weight's shape.
    """
    learns = weight_of(layer).requires_grad
    layer._parameters["weight"] = nn.Parameter(made.detach().clone(), requires_grad=learns)
    return become(layer, BakedLayer)


def _bake(layer: nn.Module, calls: Sequence[Arguments]) -> bool:
    weight = layer._parameters.get("weight")
    if weight is None:
        return False
    args, kwargs = calls[0]
    if first_tensor(args, kwargs) is None:
        return False
    try:
        wanted = layer(*args, **kwargs)
        seen = [products_of(layer, call).products for call in calls]
        # Other inputs show whether the tensor depends on them.
        seen += [products_of(layer, change_first_tensor(args, kwargs, probe)).products for probe in PROBES]
    except Exception as error:  # the user's forward; `reason_against` will say it
        if is_out_of_memory(error):
            raise
        return False
    if any(len(products) != 1 for products in seen):
        return False
    made = seen[0][0].weight
    if made is weight or made.shape != weight.shape:
        return False
    if not all(torch.equal(products[0].weight, made) for products in seen):
        return False
    before = weight
    baked_layer(layer, made)
    if torch.equal(layer(*args, **kwargs), wanted):
        return True
    layer._parameters["weight"] = before
    resign(layer)
    return False
