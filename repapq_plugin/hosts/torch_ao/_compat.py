"""What this host uses of torch.ao that is private or undocumented, all of it (seen with torch 2.12.1).

`integration/torch_ao/test_torch_ao_compat.py` fails with the name of what a later torch no longer has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.ao.nn import intrinsic
from torch.ao.nn.intrinsic import qat
from torch.ao.quantization import FakeQuantizeBase, ObserverBase, QConfig
from torch.ao.quantization.fx._lower_to_native_backend import (
    is_copy_node,
    is_general_tensor_shape_node,
    is_other_node,
)
from torch.fx import Node

from repapq_plugin.core.modules import without_hooks

MOVING: tuple[Callable[[Node, dict[str, nn.Module]], tuple[bool, ...]], ...] = (
    is_copy_node,
    is_general_tensor_shape_node,
    is_other_node,
)
"""torch.ao's own checks for operators that it takes to keep the grid of their input."""

RECTIFIED = (
    intrinsic.ConvReLU2d,
    intrinsic.LinearReLU,
    qat.ConvReLU2d,
    qat.LinearReLU,
    qat.ConvBnReLU2d,
)
"""What torch.ao fuses from a layer and its ReLU."""

NORMED = (qat.ConvBn2d, qat.ConvBnReLU2d, qat.LinearBn1d)
"""What torch.ao fuses from a layer and its batch norm to be trained; it quantizes the product of both."""


class GridModule(Protocol):
    """What a conversion reads from an observer or a fake quantizer."""

    dtype: torch.dtype
    quant_min: int
    quant_max: int

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Return ``scale`` (float) and ``zero_point`` (integers)."""


class _Configured(Protocol):
    qconfig: QConfig | None


class _Trained(Protocol):
    def to_float(self) -> nn.Module: ...


def is_quantizer(module: object) -> bool:
    """Whether torch.ao takes ``module`` for an observer or a fake quantizer."""
    return isinstance(module, ObserverBase | FakeQuantizeBase)


def new_qconfig(activation: Callable[..., nn.Module], weight: Callable[..., nn.Module]) -> QConfig:
    """Return a ``QConfig`` of two factories."""
    return QConfig(activation=activation, weight=weight)  # type: ignore[no-untyped-call]


def qconfig_of(module: nn.Module) -> QConfig | None:
    """Return the ``QConfig`` that hangs on a module, if one does."""
    return cast("QConfig | None", getattr(module, "qconfig", None))


def set_qconfig(module: nn.Module, qconfig: QConfig | None) -> None:
    """Hang a ``QConfig`` on a module, as ``propagate_qconfig_`` does."""
    cast(_Configured, module).qconfig = qconfig


def output_quantizer_of(module: nn.Module) -> nn.Module | None:
    """Return what eager ``prepare`` hung on a module to watch its output, if anything."""
    quantizer = getattr(module, "activation_post_process", None)
    # Fake quantizers have an attribute of that name too: the observer inside them.
    return quantizer if isinstance(quantizer, nn.Module) and not is_quantizer(module) else None


def trained_weight_quantizer_of(module: nn.Module) -> nn.Module | None:
    """Return the quantizer inside a layer that ``prepare_qat`` or ``prepare_qat_fx`` made, if it is one."""
    return cast("nn.Module | None", getattr(module, "weight_fake_quant", None))


def layer_of(module: nn.Module) -> nn.Module:
    """Return the layer inside a module that torch.ao fused from it and what follows."""
    # What training-aware modules hold at index 0 is no layer: they are the layer.
    fused = isinstance(module, nn.Sequential) and trained_weight_quantizer_of(module) is None
    return cast(nn.Sequential, module)[0] if fused and len(cast(nn.Sequential, module)) else module


def plain_layer(layer: nn.Module) -> nn.Module:
    """Return a layer without what torch.ao hung on it or made of it."""
    trained = hasattr(layer, "to_float")
    plain = layer_of(cast(_Trained, layer).to_float()) if trained else without_hooks(layer)
    plain.__dict__.pop("qconfig", None)
    return plain


def norm_of(module: nn.Module) -> nn.BatchNorm2d:
    """Return the batch norm of one of `NORMED` (of one or two dimensions, which have the same tensors)."""
    return cast(nn.BatchNorm2d, module.bn)
