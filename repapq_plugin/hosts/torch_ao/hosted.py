"""torch.ao behind the call that every host has: calibrate a network of images, and run it in integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.hosts.hosted import HostedNetwork
from repapq_plugin.hosts.torch_ao.backend import TorchAOBackend
from repapq_plugin.job import Job, Report


def quantize_network(
    network: nn.Module,
    images: Sequence[Tensor],
    config: RepAPQConfig,
    progress: Report | None = None,
    options: Mapping[str, object] | None = None,
) -> HostedNetwork:
    """Calibrate a network and convert it to torch.ao's integer modules.

    Args:
        network: Takes images, float ``(N, C, H, W)``; not changed.
        images: Calibration batches.
        config: Bits, ranges and calibration.
        progress: Called as the work goes on.
        options: ``backend``: torch's engine of integer kernels.

    Returns:
        The integer network; the simulated one, with the reason in the result's notes, where the
        network's Python cannot be traced.

    Raises:
        ConfigError: An option is unknown, or torch has no such engine here.
        CalibrationError: See `quantize_model`.
    """
    return Job(TorchAOBackend(options), config, report=progress).run(network, images)
