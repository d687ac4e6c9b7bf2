"""What torch.ao is told: a ``QConfig`` or ``QConfigMapping`` made of our observers and fake quantizers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.ao.quantization import (
    QConfig,
    QConfigMapping,
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
)
from torch.nn import functional

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.quant_primitives import activation_bounds, weight_bounds
from repapq_plugin.hosts.torch_ao.engines import checked_engine
from repapq_plugin.observers import OBSERVERS
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize, PerChannelLearnableFakeQuantize

NO_KERNEL: tuple[Any, ...] = (
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d),
    *(nn.LayerNorm, functional.layer_norm, nn.PReLU),
)
"""Left float: torch.ao's usual engines have no integer kernel for them with a scale per output channel."""

AVERAGES: tuple[Any, ...] = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(torch.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d),
    *(torch.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d),
    *(torch.mean, "mean"),
)
"""Left float: a mean of a few integers often lies exactly between two codes, where integer kernels round
otherwise than the simulation does."""


def repapq_config(config: RepAPQConfig | str) -> RepAPQConfig:
    """Return the configuration itself, or the one that a preset (``"w4a4"``) names."""
    return RepAPQConfig.from_preset(config) if isinstance(config, str) else config


def repapq_qconfig(
    config: RepAPQConfig | str = "w8a8", *, is_qat: bool = False, bits: tuple[int, int] | None = None
) -> QConfig:
    """Return a torch.ao ``QConfig`` with our classes.

    Args:
        config: Bits and observers, or a preset's name. ``activation_observer="auto"`` means MSE here:
            it takes a second look at layers' outputs that torch.ao's flow does not offer.
        is_qat: Give fake quantizers with a learnable scale, for ``prepare_qat`` and
            ``prepare_qat_fx``; else observers, for ``prepare`` and ``prepare_fx``.
        bits: ``(weight_bits, activation_bits)`` in place of the configuration's.

    Raises:
        ConfigError: The preset is unknown.
    """
    config = repapq_config(config)
    weight_bits, activation_bits = bits or (config.weight_bits, config.activation_bits)
    name = "mse" if config.activation_observer == "auto" else config.activation_observer
    observer: Any = OBSERVERS[name]
    if name == "percentile":
        observer = partial(observer, percentile=config.percentile)
    low, high = activation_bounds(activation_bits)
    activation = {"dtype": torch.quint8, "qscheme": torch.per_tensor_affine, "quant_min": low, "quant_max": high}
    low, high = weight_bounds(config.weight_bits_used(weight_bits))
    weight = {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric, "quant_min": low, "quant_max": high}
    weight_observer = OBSERVERS[f"per_channel_{config.weight_observer}"]
    if is_qat:
        return new_qconfig(
            LearnableFakeQuantize.with_args(observer=observer, **activation),
            PerChannelLearnableFakeQuantize.with_args(observer=weight_observer, **weight),
        )
    if name == "percentile":
        activation["percentile"] = config.percentile
    return new_qconfig(OBSERVERS[name].with_args(**activation), weight_observer.with_args(**weight))


def new_qconfig(activation: Any, weight: Any) -> QConfig:
    """Return a ``QConfig`` of two factories."""
    return QConfig(activation=activation, weight=weight)  # type: ignore[no-untyped-call]


def repapq_qconfig_mapping(
    config: RepAPQConfig | str = "w8a8",
    backend: str = "x86",
    *,
    is_qat: bool = False,
    first_last: Iterable[str] = (),
) -> QConfigMapping:
    """Return torch.ao's default mapping for ``backend`` with our classes in it.

    Args:
        config: Bits and observers, or a preset's name (``"w8a8"``, ``"w6a6"``, ``"w4a4"``, ...).
        backend: Engine of torch's integer kernels: ``x86``, ``fbgemm``, ``onednn`` or ``qnnpack``.
        is_qat: For ``prepare_qat_fx`` instead of ``prepare_fx``, see `repapq_qconfig`.
        first_last: Names of modules that get the configuration's ``first_last_bits``. A mapping knows
            no network, so it cannot find them; a module's activation bits are those of its output.

    Raises:
        ConfigError: The preset is unknown, or torch has no such engine here.
    """
    config = repapq_config(config)
    engine = checked_engine(backend)
    mapping = (get_default_qat_qconfig_mapping if is_qat else get_default_qconfig_mapping)(engine)
    mapping.set_global(repapq_qconfig(config, is_qat=is_qat))
    for kind in (*NO_KERNEL, *AVERAGES):
        mapping.set_object_type(kind, None)
    bits = config.first_last_bits
    if bits is not None:
        for name in first_last:
            mapping.set_module_name(name, repapq_qconfig(config, is_qat=is_qat, bits=(bits, bits)))
    return mapping
