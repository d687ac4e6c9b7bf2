"""pt2e behind the call that every host has: calibrate a network of images, and run it as a converted graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.hosts.hosted import HostedNetwork
from repapq_plugin.hosts.pt2e.backend import Pt2eBackend
from repapq_plugin.job import Job, Report


def quantize_network(
    network: nn.Module,
    images: Sequence[Tensor],
    config: RepAPQConfig,
    progress: Report | None = None,
    options: Mapping[str, object] | None = None,
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
        CalibrationError: See `quantize_model`.
    """
    return Job(Pt2eBackend(options), config, report=progress).run(network, images)
