"""torch.ao: our classes by name in a ``QConfig``, and real integer modules from a calibration.

The observers and fake quantizers are those of `repapq_plugin` itself; they stand on torch.ao's bases.
"""

from repapq_plugin.hosts.torch_ao.arithmetic import simulate_integers
from repapq_plugin.hosts.torch_ao.backend import TorchAOBackend
from repapq_plugin.hosts.torch_ao.eager import convert_eager, prepare_learned_eager
from repapq_plugin.hosts.torch_ao.engines import exact_engine, integer_engine, saturates
from repapq_plugin.hosts.torch_ao.fx import convert_to_int8, prepare_learned
from repapq_plugin.hosts.torch_ao.grid import carry_grid
from repapq_plugin.hosts.torch_ao.qconfig import repapq_qconfig, repapq_qconfig_mapping
from repapq_plugin.hosts.torch_ao.simulated import quantized_network

__all__ = [
    "TorchAOBackend",
    "carry_grid",
    "convert_eager",
    "convert_to_int8",
    "exact_engine",
    "integer_engine",
    "prepare_learned",
    "prepare_learned_eager",
    "quantized_network",
    "repapq_qconfig",
    "repapq_qconfig_mapping",
    "saturates",
    "simulate_integers",
]
