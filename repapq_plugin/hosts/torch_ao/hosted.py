"""torch.ao as an engine: a calibrated network as one module that runs in integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.errors import ConfigError
from repapq_plugin.hosts.hosted import HostedNetwork, calibrate_for_host
from repapq_plugin.hosts.torch_ao.engines import checked_engine, integer_engine
from repapq_plugin.hosts.torch_ao.fx import ENGINE, convert_to_int8, prepare_learned
from repapq_plugin.job import Progress

RANGE_BATCHES = 8
"""Calibration batches that give outputs their range which torch.ao quantizes besides (our choice)."""


class IntegerNetwork(nn.Module):
    """Integer modules together with the engine that they were converted for.

    Args:
        network: From `convert_to_int8`.
        engine: What it was converted for.
    """

    def __init__(self, network: nn.Module, engine: str) -> None:
        super().__init__()
        self.network, self.engine = network, engine

    def forward(self, *inputs: Tensor) -> Any:
        """Run the network on its inputs, whatever engine torch has active elsewhere."""
        with integer_engine(self.engine):
            return self.network(*inputs)


def integer_network(network: nn.Module, images: Sequence[Tensor], backend: str | None = None) -> IntegerNetwork:
    """Return the integer form of a calibrated network that takes images, ``(N, C, H, W)``.

    Args:
        network: Holds quantized layers; not changed.
        images: Calibration batches.
        backend: torch's engine; default: `exact_engine`.

    Raises:
        HostError: See `prepare_learned`.
        ConfigError: torch has no such engine here.
    """
    prepared = prepare_learned(network, (images[0],), images[:RANGE_BATCHES], backend=backend)
    return IntegerNetwork(convert_to_int8(prepared), prepared.meta[ENGINE])


def quantize_network(
    network: nn.Module,
    images: Sequence[Tensor],
    config: RepAPQConfig,
    progress: Callable[[Progress], None] | None = None,
    options: Mapping[str, Any] | None = None,
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
    """
    unknown = sorted(set(options or {}) - {"backend"})
    if unknown:
        raise ConfigError(f"options.{unknown[0]} is not a key; known keys: backend.")
    backend = (options or {}).get("backend")
    if backend is not None:
        checked_engine(backend)
    return calibrate_for_host(
        network, images, config, progress, lambda calibrated, data: integer_network(calibrated, data, backend)
    )
