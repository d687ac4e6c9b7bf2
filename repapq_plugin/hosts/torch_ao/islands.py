"""What stands for a layer in eager mode, where a network's own Python calls it, as it called the layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.ao.quantization import QuantStub

from repapq_plugin.core.modules import replace_modules
from repapq_plugin.core.quant_primitives import grid_bounds
from repapq_plugin.core.tensors import change_first_tensor, first_tensor
from repapq_plugin.hosts.torch_ao.carried import plain_layer_of, reason_to_simulate
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize
from repapq_plugin.quantizers.layers import QuantizedLayer
from repapq_plugin.quantizers.own_forward import calls_of


class Carrier(nn.Module):
    """Calls a layer that takes one tensor, behind padding that it cannot do itself and a grid that it learned.

    Args:
        layer: Torch's own layer; a conversion puts its integer module in its place.
        before: What is done to the tensor first.
    """

    def __init__(self, layer: nn.Module, *before: nn.Module) -> None:
        super().__init__()
        self.layer, self.before = layer, nn.Sequential(*before)

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Run the layer on the tensor that it is called with, by position or by keyword."""
        return cast(Tensor, self.layer(self.before(first_tensor(args, kwargs))))


class Regrid(nn.Module):
    """Brings a tensor, float or quantized, onto the grid that a layer reads.

    Args:
        quantizer: Learned, of 8 bits or fewer; unsigned.
    """

    def __init__(self, quantizer: LearnableFakeQuantize) -> None:
        super().__init__()
        scale, zero_point = quantizer.calculate_qparams()
        self.scale, self.zero_point = float(scale), int(zero_point)
        self.codes = (quantizer.quant_min, quantizer.quant_max)
        self.bounds = grid_bounds(scale, zero_point, *self.codes)

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x``, any shape."""
        if not x.is_quantized:
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, *self.codes)
        inside = x.dequantize().clamp(*self.bounds)
        return torch.quantize_per_tensor(inside, self.scale, self.zero_point, torch.quint8)

    def extra_repr(self) -> str:
        """Say the grid."""
        return f"scale={self.scale:g}, zero_point={self.zero_point}, {list(self.codes)}"


class Island(nn.Module):
    """Runs a calibrated layer as it is, in float, between quantized tensors.

    Args:
        layer: The layer, with its own quantizers.
    """

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.layer, self.quant = layer, QuantStub()

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Run the layer with the arguments of its own forward; what it gives is quantized again."""
        args, kwargs = change_first_tensor(args, kwargs, lambda x: x.dequantize() if x.is_quantized else x)
        return cast(Tensor, self.quant(self.layer(*args, **kwargs)))


@torch.no_grad()
def put_carriers(
    model: nn.Module, layers: Mapping[str, QuantizedLayer], run: Callable[[], object], engine: str
) -> dict[str, QuantizedLayer]:
    """Put torch's own layers in the places of calibrated ones, and islands where no integer module can stand.

    Args:
        model: A copy of the calibrated network; changed in place.
        layers: The layers of the calibrated network by module path.
        run: Makes a forward pass of ``model``.
        engine: One of torch's engines.

    Returns:
        The layers again, by the module paths at which their stand-ins are.
    """
    copies = {name: cast(QuantizedLayer, model.get_submodule(name)) for name in layers}
    calls = calls_of(list(set(copies.values())), run)
    new: dict[nn.Module, nn.Module] = {}
    for layer in set(copies.values()):
        if reason_to_simulate(layer, calls.get(layer, []), engine):
            new[layer] = Island(layer)
            continue
        plain, padding = plain_layer_of(layer)
        keywords = any(kwargs for _, kwargs in calls[layer])
        before = [] if padding is None else [padding]
        new[layer] = Carrier(plain, *before) if keywords or before else plain
    replace_modules(model, new)
    return {
        f"{name}.layer" if isinstance(new[copies[name]], Carrier) else name: layer for name, layer in layers.items()
    }


def put_regrids(model: nn.Module, regrids: Mapping[nn.Module, nn.Module]) -> None:
    """Put grids in front of layers, in place; in front of their padding too.

    Args:
        model: A prepared network.
        regrids: What stands in front of each layer.
    """
    attributes = attributes_of(model)
    carriers = {module.layer: module for module in model.modules() if isinstance(module, Carrier)}
    for layer, regrid in regrids.items():
        if layer in carriers:
            carriers[layer].before.insert(0, regrid)
    replace_modules(
        model, {layer: Carrier(layer, regrid) for layer, regrid in regrids.items() if layer not in carriers}
    )
    give_back(model, attributes)


def attributes_of(model: nn.Module) -> dict[str, dict[str, object]]:
    """Return the plain attributes of every module, by module path."""
    return {name: _plain(module) for name, module in model.named_modules()}


def give_back(model: nn.Module, attributes: Mapping[str, Mapping[str, object]]) -> None:
    """Give modules that stand for others what a network's Python may read of those, where they have no such thing."""
    for name, module in model.named_modules():
        for key, value in attributes.get(name, {}).items():
            if not hasattr(module, key):
                setattr(module, key, value)


def _plain(module: nn.Module) -> dict[str, object]:
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and key != "qconfig" and not isinstance(value, nn.Module | Tensor)
    }
