"""The plugin's own quantizers keep the contract of a backend."""

from __future__ import annotations

from repapq_plugin.backend import OwnBackend
from repapq_plugin.result import CalibrationResult
from tests.contracts.backend import BackendContract


class TestOwnBackend(BackendContract):
    def backend(self) -> OwnBackend:
        return OwnBackend()

    def record(self, result: CalibrationResult) -> CalibrationResult:
        return result
