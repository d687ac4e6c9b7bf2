"""The bit widths that a unit can get, as users write them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.errors import ConfigError

Bits = tuple[int, int]
"""``(weight_bits, activation_bits)``."""

WIDTHS = ("3", "4", "5", "6", "8")
"""What a unit can get unless somebody says otherwise (our choice: fewer than 3 bits cost more than they save)."""

EIGHT: Bits = (8, 8)


def shown(bits: Bits) -> str:
    """Return a width as a preset names it: ``"w4a8"``."""
    return f"w{bits[0]}a{bits[1]}"


def bit_widths(widths: Sequence[str | int | Bits], config: RepAPQConfig) -> tuple[Bits, ...]:
    """Read bit widths.

    Args:
        widths: Each a number for weights and activations alike (``4``), ``"w4a8"``, or a pair.
        config: Whose rules hold for them.

    Returns:
        Pairs, each once, those of the fewest bits first.

    Raises:
        ConfigError: A width is none, or there are fewer than two.
    """
    found = dict.fromkeys(_width(width, config) for width in widths)
    if len(found) < 2:
        raise ConfigError(f"bits={list(widths)!r} is not allowed; give at least two bit widths to choose from.")
    return tuple(sorted(found, key=lambda bits: (bits[0] * bits[1], bits)))


def _width(width: str | int | Bits, config: RepAPQConfig) -> Bits:
    pair: tuple[object, ...] = ()
    if isinstance(width, list | tuple):
        pair = tuple(width)
    elif match := re.fullmatch(r"(\d)|w(\d)a(\d)", str(width).strip().lower(), re.ASCII):
        pair = (int(match[1] or match[2]), int(match[1] or match[3]))
    if len(pair) != 2:
        raise ConfigError(f"bits={width!r} is not allowed; write a number of bits such as 4, or w4a8.")
    checked = config.replace(weight_bits=pair[0], activation_bits=pair[1])
    return checked.weight_bits, checked.activation_bits
