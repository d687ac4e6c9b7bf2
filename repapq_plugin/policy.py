"""One policy for all hosts: which layers are quantized, with how many bits, and which observer a name means."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase

from torch import nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.errors import ConfigError
from repapq_plugin.observers import OBSERVERS, RangeObserver

KEPT_FLOAT = "kept float by the configuration"
NO_CHANNEL_AXIS = "grouped transposed convolution: its weight has no axis of output channels"

AUTO_CANDIDATES = ("min_max", "mse", "mae")
"""What ``activation_observer="auto"`` chooses from, for every quantizer by what it does to the layers behind it."""

AUTO_ALONE = "mse"
"""What ``auto`` means to a flow that lets one observer watch and shows it no layer's output: a ``QConfig`` of
torch.ao, a specification of pt2e (our choice: of the three it needs learning least)."""


def repapq_config(config: RepAPQConfig | str) -> RepAPQConfig:
    """Return the configuration itself, or the one that a preset (``"w4a4"``) names.

    Raises:
        ConfigError: The preset is unknown.
    """
    return RepAPQConfig.from_preset(config) if isinstance(config, str) else config


def bits_of(name: str, at_an_end: bool, config: RepAPQConfig) -> tuple[int, int]:
    """Return ``(weight_bits, activation_bits)`` of a layer.

    Args:
        name: Its module path.
        at_an_end: Whether it reads the network's input or writes its output.
        config: Says the bits; the last pattern of ``layer_bits`` that matches wins.
    """
    bits = (config.weight_bits, config.activation_bits)
    if config.first_last_bits is not None and at_an_end:
        bits = (config.first_last_bits, config.first_last_bits)
    for pattern, special in config.layer_bits.items():
        if fnmatchcase(name, pattern):
            bits = special
    return config.weight_bits_used(bits[0]), bits[1]


def is_kept_float(name: str, config: RepAPQConfig) -> bool:
    """Whether ``keep_float`` names a layer, or a module around it."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in config.keep_float)


def reason_for_float(name: str, layer: nn.Module, config: RepAPQConfig) -> str:
    """Return why a layer stays float, or an empty text."""
    if is_kept_float(name, config):
        return KEPT_FLOAT
    return NO_CHANNEL_AXIS if isinstance(layer, nn.ConvTranspose2d) and layer.groups > 1 else ""


def check_target(config: RepAPQConfig, host: str, targets: Collection[str]) -> None:
    """Refuse a target whose grids a host does not have.

    Args:
        config: Names the target.
        host: What to call it in a message.
        targets: Names of the targets that it serves.

    Raises:
        ConfigError: The configuration names another one.
    """
    if config.target not in targets:
        raise ConfigError(
            f"target={config.runs_on.name!r} is not allowed with {host}, whose integers are those of "
            f"{', '.join(map(repr, targets))}; choose one of these, or quantize with quantize_model."
        )


def check_names(config: RepAPQConfig, modules: Collection[str], layers: Collection[str]) -> None:
    """Refuse a configuration that names what a network has not.

    Args:
        config: Its ``keep_float``, ``units`` and ``stages`` name modules, its ``layer_bits`` layers.
        modules: Paths of all modules.
        layers: Paths of the layers that can be quantized.

    Raises:
        ConfigError: A pattern matches nothing; the message names key and pattern.
    """
    for key in ("keep_float", "units", "stages"):
        check_patterns(getattr(config, key), modules, key)
    check_patterns(config.layer_bits, layers, "layer_bits")


def check_patterns(patterns: Iterable[str], names: Iterable[str], key: str) -> None:
    """Refuse patterns that match none of ``names``.

    Raises:
        ConfigError: One matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"{key}: the pattern {pattern!r} matches no module of the merged model.")


def activation_observers(config: RepAPQConfig) -> tuple[str, ...]:
    """Return the names of the observers that watch each activation; of several, the least disturbing range wins."""
    return AUTO_CANDIDATES if config.activation_observer == "auto" else (config.activation_observer,)


def lone_activation_observer(config: RepAPQConfig) -> str:
    """Return the name of the observer for a flow that takes one: `AUTO_ALONE` for ``auto``."""
    return AUTO_ALONE if config.activation_observer == "auto" else config.activation_observer


def observer_class(name: str, *, per_channel: bool) -> Callable[..., RangeObserver]:
    """Return the class that a configuration's name of an observer means.

    Args:
        name: ``"mse"``, or any name that `register_observer` was given.
        per_channel: Whether each channel gets a range of its own.

    Raises:
        ConfigError: No observer of this name gives such a range.
    """
    registered = f"per_channel_{name}" if per_channel else name
    if registered not in OBSERVERS:
        kind = "each channel" if per_channel else "a whole tensor"
        raise ConfigError(f"The observer {name!r} finds no range of {kind}; register one as {registered!r}.")
    return OBSERVERS[registered]


def observer_arguments(name: str, config: RepAPQConfig) -> dict[str, float]:
    """Return what an observer is told besides its grid."""
    return {"percentile": config.percentile} if name == "percentile" else {}
