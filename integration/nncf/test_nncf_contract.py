"""NNCF's quantizers keep the contract of a backend."""

from __future__ import annotations

import nncf
from nncf.quantization.advanced_parameters import OverflowFix
from torch import nn

from repapq_plugin.hosts.nncf.backend import NNCFBackend, NNCFOptions
from repapq_plugin.result import Calibrated
from tests.contracts.backend import BackendContract


class TestNNCFBackend(BackendContract):
    def backend(self) -> NNCFBackend:
        # Without NNCF's own answer to rounding, quantizers that are off leave the float network. Without its answer to
        # 16-bit sums, weights have all the bits of the policy.
        parameters = nncf.AdvancedQuantizationParameters(disable_bias_correction=True, overflow_fix=OverflowFix.DISABLE)
        return NNCFBackend(NNCFOptions(advanced_parameters=parameters))

    def record(self, result: Calibrated) -> Calibrated:
        return result

    def delivered_flags(self, model: nn.Module, delivered: nn.Module) -> dict[str, bool]:
        """As `nncf.quantize` leaves them, which people fine-tune: only what the user had frozen stays frozen."""
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        never = ("_num_bits", "signed_tensor")
        return {name: name not in frozen and not name.endswith(never) for name, _ in delivered.named_parameters()}
