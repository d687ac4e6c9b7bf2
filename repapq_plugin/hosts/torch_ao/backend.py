"""The one job on torch.ao: the calibrated network is delivered as one module that runs in integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from repapq_plugin.backend import PlainBackend
from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.running import Batch
from repapq_plugin.errors import ConfigError
from repapq_plugin.hosts.hosted import HostedNetwork, converted_or_simulated
from repapq_plugin.hosts.torch_ao.engines import checked_engine, integer_engine
from repapq_plugin.hosts.torch_ao.fx import ENGINE, SIMULATED, convert_to_int8, note_of, prepare_learned
from repapq_plugin.policy import check_target
from repapq_plugin.result import Calibrated

RANGE_BATCHES = 8
"""Calibration batches that give outputs their range which torch.ao quantizes besides (our choice)."""


class IntegerNetwork(nn.Module):
    """Integer modules together with the engine that they were converted for.

    Args:
        network: From `convert_to_int8`.
        engine: What it was converted for.
        notes: What is to be said of layers that no integer module stands for.
    """

    def __init__(self, network: nn.Module, engine: str, notes: Sequence[str] = ()) -> None:
        super().__init__()
        self.network, self.engine, self.notes = network, engine, tuple(notes)

    def forward(self, *inputs: Tensor) -> object:
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
    simulated = prepared.meta[SIMULATED]
    notes = [note_of(simulated)] if simulated else []
    return IntegerNetwork(convert_to_int8(prepared), prepared.meta[ENGINE], notes)


class TorchAOBackend(PlainBackend[HostedNetwork]):
    """Calibrates with the plugin's quantizers and delivers torch.ao's integer modules.

    The network takes images, float ``(N, C, H, W)``, and so does each batch.

    Args:
        options: ``backend``: torch's engine of integer kernels; default: `exact_engine`.
    """

    def __init__(self, options: Mapping[str, object] | None = None) -> None:
        self.options = dict(options or {})

    def check(self, model: nn.Module, batches: Sequence[Batch], config: RepAPQConfig) -> None:
        """Refuse targets and options that torch.ao does not know.

        Raises:
            ConfigError: An option is unknown, torch has no such engine here, or the target has other integers.
        """
        check_target(config, "torch.ao", ("generic",))
        unknown = sorted(set(self.options) - {"backend"})
        if unknown:
            raise ConfigError(f"options.{unknown[0]} is not a key; known keys: backend.")
        self._engine()

    def deliver(self, calibrated: Calibrated, batches: Sequence[Batch]) -> HostedNetwork:
        """Return integer modules; the simulated network where its Python cannot be traced."""
        images = cast("Sequence[Tensor]", batches)

        def convert(network: nn.Module) -> tuple[nn.Module, Sequence[str]]:
            converted = integer_network(network, images, self._engine())
            return converted, converted.notes

        return converted_or_simulated(calibrated, convert)

    def _engine(self) -> str | None:
        name = self.options.get("backend")
        return None if name is None else checked_engine(name)
