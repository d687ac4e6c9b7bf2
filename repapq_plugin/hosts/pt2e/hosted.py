"""pt2e as an engine: a calibrated network as one converted graph for batches of any size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.errors import ConfigError
from repapq_plugin.hosts.hosted import HostedNetwork, calibrate_for_host
from repapq_plugin.hosts.pt2e.learned import prepare_learned
from repapq_plugin.job import Progress

SMALLEST_EXAMPLE = 2
"""Images in the batch that is exported: of one alone, torch.export would make a constant."""


def converted_network(network: nn.Module, images: Sequence[Tensor]) -> nn.Module:
    """Return the converted form of a calibrated network that takes images, ``(N, C, H, W)``, with N open.

    Args:
        network: Holds quantized layers; not changed.
        images: The first batch is the example of the export.

    Raises:
        HostError: See `prepare_learned`.
    """
    example = images[0]
    if len(example) < SMALLEST_EXAMPLE:
        example = example.expand(SMALLEST_EXAMPLE, *example.shape[1:]).contiguous()
    shapes = {0: torch.export.Dim("batch", min=1)}
    converted: nn.Module = convert_pt2e(prepare_learned(network, (example,), dynamic_shapes=(shapes,)))
    return converted


def quantize_network(
    network: nn.Module,
    images: Sequence[Tensor],
    config: RepAPQConfig,
    progress: Callable[[Progress], None] | None = None,
    options: Mapping[str, Any] | None = None,
) -> HostedNetwork:
    """Calibrate a network and convert it with pt2e.

    Args:
        network: Takes images, float ``(N, C, H, W)``; not changed.
        images: Calibration batches.
        config: Bits, ranges and calibration.
        progress: Called as the work goes on.
        options: None is known.

    Returns:
        The converted graph; the simulated network, with the reason in the result's notes, where it
        cannot be exported.

    Raises:
        ConfigError: An option is given.
    """
    if options:
        raise ConfigError(f"options.{min(options)} is not a key; pt2e takes no options.")
    return calibrate_for_host(network, images, config, progress, converted_network)
