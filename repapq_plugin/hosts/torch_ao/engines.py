"""torch's engines of integer kernels, and which of them computes exact sums on this processor."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from repapq_plugin.core.quant_primitives import activation_bounds, weight_bounds
from repapq_plugin.errors import ConfigError, HostError
from repapq_plugin.evaluation.processor import has_vnni
from repapq_plugin.quantizers.layers import QuantizedLayer

logger = logging.getLogger(__name__)

ENGINES = ("x86", "fbgemm", "onednn", "qnnpack")
SATURATING = ("x86", "fbgemm", "onednn")
"""Engines that add pairs of 8-bit products in 16 bits where the processor has no VNNI."""

SUM_LIMIT = 2**15 - 1
"""Largest sum of two products that those hold."""

INTEGER_BIAS = ("qnnpack",)
"""Engines that round a bias to a multiple of input scale times weight scale."""

NO_TRANSPOSED_CHANNELS = ("x86", "fbgemm")
"""Engines without a transposed convolution that has a weight scale per channel; it stays float."""

NO_OUTPUT_PADDING = ("onednn",)
"""Engines whose transposed convolution adds nothing to its output."""

CLAMPS_CONTIGUOUS = ("qnnpack",)
"""Engines whose clamp mixes up elements of a tensor in channels-last order (seen with torch 2.12)."""

_said: set[str] = set()


def checked_engine(name: object) -> str:
    """Return ``name`` if torch has that engine here.

    Raises:
        ConfigError: It has not; the message lists those that it has.
    """
    supported = [engine for engine in ENGINES if engine in torch.backends.quantized.supported_engines]
    if not isinstance(name, str) or name not in supported:
        raise ConfigError(f"backend={name!r} is not allowed; torch here has {', '.join(supported)}.")
    return name


def saturates(engine: str, activation_bits: int = 8, weight_bits: int = 8) -> bool:
    """Return whether sums of ``engine`` can be wrong on this processor.

    Two products of 8-bit activations with 8-bit weights overflow the 16 bits that they are added in;
    with 7 bits of either they just fit.

    Args:
        engine: One of torch's engines.
        activation_bits: Bits of the activations, unsigned.
        weight_bits: Bits of the weights, narrow range.
    """
    pair = 2 * activation_bounds(activation_bits)[1] * weight_bounds(weight_bits)[1]
    return engine in SATURATING and pair > SUM_LIMIT and not has_vnni()


def exact_engine(bits: Iterable[tuple[int, int]] = ((8, 8),)) -> str:
    """Return the engine to prefer: ``x86``, or ``qnnpack`` where that one saturates.

    Args:
        bits: ``(weight_bits, activation_bits)`` of the layers.
    """
    supported = torch.backends.quantized.supported_engines
    if "x86" in supported and not any(saturates("x86", activation, weight) for weight, activation in bits):
        return "x86"
    return "qnnpack" if "qnnpack" in supported else checked_engine(torch.backends.quantized.engine)


def engine_for(layers: Iterable[QuantizedLayer]) -> str:
    """Return `exact_engine` for the layers of a calibrated network."""
    return exact_engine({(layer.weight_fake_quant.num_bits, layer.input_fake_quant.num_bits) for layer in layers})


def has_kernel(layer: QuantizedLayer, engine: str) -> bool:
    """Whether ``engine`` has an integer kernel for a layer, and its weight is quantized at all."""
    transposed = isinstance(layer, nn.ConvTranspose2d)
    return layer.weight_fake_quant.quantizing and not (transposed and engine in NO_TRANSPOSED_CHANNELS)


def refuse_signed_inputs(layers: Mapping[str, QuantizedLayer]) -> None:
    """Refuse layers that read signed integers: torch's kernels read unsigned ones.

    Args:
        layers: Quantized layers by module path.

    Raises:
        HostError: One reads signed integers.
    """
    for name, layer in layers.items():
        if layer.input_fake_quant.quant_min < 0:
            raise HostError(
                f"{name!r} reads signed integers, and torch's kernels have unsigned inputs; quantize for the target "
                "'generic', or take the network to pt2e."
            )


@contextmanager
def integer_engine(name: str) -> Iterator[None]:
    """Let torch pack weights for, and run, one engine; undone at the end.

    Integer modules belong to the engine that they were converted under, and run only under it.

    Raises:
        ConfigError: torch has no such engine here.
    """
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = checked_engine(name)
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def warn_of_saturation(engine: str) -> None:
    """Say once per engine that sums may be wrong here, and what to do."""
    if engine not in _said:
        _said.add(engine)
        logger.warning(
            "The engine %r adds pairs of 8-bit products in 16 bits on this processor (no VNNI), which saturates: "
            "integer results can differ from the simulated ones. Quantize with reduce_range=True, or choose "
            "backend='qnnpack'.",
            engine,
        )
