"""pt2e's backend keeps the contract; what it delivers besides is a converted graph."""

from __future__ import annotations

from repapq_plugin.hosts.hosted import HostedNetwork
from repapq_plugin.hosts.pt2e.backend import Pt2eBackend
from repapq_plugin.result import CalibrationResult
from tests.contracts.backend import BackendContract


class TestPt2eBackend(BackendContract):
    def backend(self) -> Pt2eBackend:
        return Pt2eBackend()

    def record(self, result: HostedNetwork) -> CalibrationResult:
        return result.result
