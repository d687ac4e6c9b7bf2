"""torch.ao's backend keeps the contract; what it delivers besides is its integer form."""

from __future__ import annotations

from repapq_plugin.hosts.hosted import HostedNetwork
from repapq_plugin.hosts.torch_ao.backend import TorchAOBackend
from repapq_plugin.result import CalibrationResult
from tests.contracts.backend import BackendContract


class TestTorchAOBackend(BackendContract):
    def backend(self) -> TorchAOBackend:
        return TorchAOBackend()

    def record(self, result: HostedNetwork) -> CalibrationResult:
        return result.result
