"""What torch.ao is told: a ``QConfig`` or ``QConfigMapping`` made of our observers and fake quantizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase, translate
from functools import partial

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
from repapq_plugin.errors import ConfigError
from repapq_plugin.hosts.torch_ao._compat import new_qconfig
from repapq_plugin.hosts.torch_ao.engines import checked_engine
from repapq_plugin.observers import OBSERVERS, RangeObserver
from repapq_plugin.policy import (
    bits_of,
    check_patterns,
    check_target,
    is_kept_float,
    lone_activation_observer,
    observer_arguments,
    repapq_config,
)
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize, PerChannelLearnableFakeQuantize
from repapq_plugin.quantizers.layers import QUANTIZABLE

Kind = Callable[..., object] | str
"""What ``set_object_type`` takes: a class of modules, a function, or the name of a tensor's method."""

NO_KERNEL: tuple[Kind, ...] = (
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d),
    *(nn.LayerNorm, functional.layer_norm, nn.PReLU),
)
"""Left float: torch.ao's usual engines have no integer kernel for them with a scale per output channel."""

AVERAGES: tuple[Kind, ...] = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(torch.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d),
    *(torch.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d),
    *(torch.mean, "mean"),
)
"""Left float: a mean of a few integers often lies exactly between two codes, where integer kernels round
otherwise than the simulation does."""

BELOW_THE_NETWORK = "(?=.)"
"""In front of a pattern: ``*`` means every module, but no function that the network itself calls."""


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
        ConfigError: The preset is unknown, or the target has other integers than torch.ao's engines.
    """
    config = repapq_config(config)
    check_target(config, "torch.ao", ("generic",))
    weight_bits, activation_bits = bits or (config.weight_bits, config.activation_bits)
    name = lone_activation_observer(config)
    observer: Callable[..., RangeObserver] = OBSERVERS[name]
    weight_observer = OBSERVERS[f"per_channel_{config.weight_observer}"]
    arguments = observer_arguments(name, config)
    low, high = activation_bounds(activation_bits)
    activation = {"dtype": torch.quint8, "qscheme": torch.per_tensor_affine, "quant_min": low, "quant_max": high}
    low, high = weight_bounds(config.weight_bits_used(weight_bits))
    weight = {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric, "quant_min": low, "quant_max": high}
    if is_qat:
        return new_qconfig(
            LearnableFakeQuantize.with_args(observer=partial(observer, **arguments), **activation),
            PerChannelLearnableFakeQuantize.with_args(observer=weight_observer, **weight),
        )
    return new_qconfig(OBSERVERS[name].with_args(**activation, **arguments), weight_observer.with_args(**weight))


def repapq_qconfig_mapping(
    config: RepAPQConfig | str = "w8a8",
    backend: str = "x86",
    *,
    is_qat: bool = False,
    first_last: Iterable[str] = (),
    model: nn.Module | None = None,
) -> QConfigMapping:
    """Return torch.ao's default mapping for ``backend`` with our classes in it.

    The configuration's ``keep_float`` and ``layer_bits`` become names in the mapping, with the meaning that they
    have in `quantize_model`. But torch.ao quantizes what a module returns: a module's activation bits are those
    of its output.

    Args:
        config: Bits and observers, or a preset's name (``"w8a8"``, ``"w6a6"``, ``"w4a4"``, ...).
        backend: Engine of torch's integer kernels: ``x86``, ``fbgemm``, ``onednn`` or ``qnnpack``.
        is_qat: For ``prepare_qat_fx`` instead of ``prepare_fx``, see `repapq_qconfig`.
        first_last: Names of modules that get the configuration's ``first_last_bits``. A mapping knows
            no network, so it cannot find them.
        model: The network that will be prepared, so that patterns become names of its modules. Without it they
            become regular expressions: it cannot be checked that they match anything, and ``layer_bits`` also
            quantizes what it matches besides layers (an average pooling, a transposed convolution).

    Raises:
        ConfigError: The preset is unknown, torch has no such engine here, a pattern matches nothing in ``model``,
            or ``is_qat`` and patterns come without ``model``.
    """
    config = repapq_config(config)
    engine = checked_engine(backend)
    mapping = (get_default_qat_qconfig_mapping if is_qat else get_default_qconfig_mapping)(engine)
    mapping.set_global(repapq_qconfig(config, is_qat=is_qat))
    for kind in (*NO_KERNEL, *AVERAGES):
        mapping.set_object_type(kind, None)

    def qconfig(bits: tuple[int, int] | None) -> QConfig | None:
        return None if bits is None else repapq_qconfig(config, is_qat=is_qat, bits=bits)

    if model is not None:
        for name, bits in _named_bits(config, model).items():
            mapping.set_module_name(name, qconfig(bits))
    elif is_qat and (config.keep_float or config.layer_bits):
        raise ConfigError(
            "model=None is not allowed with is_qat=True and keep_float or layer_bits: torch.ao makes the layers that "
            "are trained before it looks at patterns of names. Give the network as model."
        )
    else:
        for regex, bits in _matched_bits(config).items():
            mapping.set_module_name_regex(regex, qconfig(bits))
    if config.first_last_bits is not None:
        for name in first_last:
            if not is_kept_float(name, config):
                mapping.set_module_name(name, qconfig(bits_of(name, True, config)))
    return mapping


def _named_bits(config: RepAPQConfig, model: nn.Module) -> dict[str, tuple[int, int] | None]:
    """Return ``(weight_bits, activation_bits)`` of what the patterns match, by module path; ``None`` for float.

    Raises:
        ConfigError: A pattern matches nothing.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = [name for name, module in modules.items() if isinstance(module, QUANTIZABLE)]
    check_patterns(config.keep_float, modules, "keep_float")
    check_patterns(config.layer_bits, layers, "layer_bits")
    named: dict[str, tuple[int, int] | None] = {
        name: bits_of(name, False, config)
        for name in layers
        if type(modules[name]) not in NO_KERNEL and any(fnmatchcase(name, pattern) for pattern in config.layer_bits)
    }
    return named | {name: None for name in modules if name and is_kept_float(name, config)}


def _matched_bits(config: RepAPQConfig) -> dict[str, tuple[int, int] | None]:
    """Return ``(weight_bits, activation_bits)`` by regular expression, ``None`` for float; the first match counts."""
    matched: dict[str, tuple[int, int] | None] = {}
    for pattern in config.keep_float:
        matched[translate(pattern)] = matched[translate(f"{pattern}.*")] = None
    for pattern, bits in reversed(list(config.layer_bits.items())):  # of those the last match counts
        matched[BELOW_THE_NETWORK + translate(pattern)] = bits
    return matched
