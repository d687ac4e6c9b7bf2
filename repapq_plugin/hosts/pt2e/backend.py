"""The one job on pt2e: the calibrated network is delivered as one converted graph for batches of any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from repapq_plugin.backend import PlainBackend
from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.running import Batch
from repapq_plugin.errors import ConfigError
from repapq_plugin.hosts.hosted import HostedNetwork, converted_or_simulated
from repapq_plugin.hosts.pt2e.learned import prepare_learned
from repapq_plugin.result import Calibrated

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


class Pt2eBackend(PlainBackend[HostedNetwork]):
    """Calibrates with the plugin's quantizers and delivers what ``convert_pt2e`` makes of the network.

    The network takes images, float ``(N, C, H, W)``, and so does each batch.

    Args:
        options: None is known.
    """

    rounds_outputs = False

    def __init__(self, options: Mapping[str, object] | None = None) -> None:
        self.options = dict(options or {})

    def check(self, model: nn.Module, batches: Sequence[Batch], config: RepAPQConfig) -> None:
        """Refuse options: pt2e takes none.

        Raises:
            ConfigError: An option is given.
        """
        if self.options:
            raise ConfigError(f"options.{min(self.options)} is not a key; pt2e takes no options.")

    def deliver(self, calibrated: Calibrated, batches: Sequence[Batch]) -> HostedNetwork:
        """Return the converted graph; the simulated network where it cannot be exported."""
        images = cast("Sequence[Tensor]", batches)
        return converted_or_simulated(calibrated, lambda network: (converted_network(network, images), ()))
