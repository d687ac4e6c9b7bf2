"""All that this host takes from NNCF beyond its documented interface (seen on nncf 3.4.0).

One place to look when NNCF moves something; `integration/nncf/test_nncf_compat.py` has a canary for each name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from nncf.common.graph.graph import NNCFGraph, NNCFNode
from nncf.common.quantization.structs import QuantizationScheme
from nncf.common.tensor_statistics import collectors
from nncf.common.tensor_statistics.collectors import AggregatorBase, TensorReducerBase
from nncf.common.tensor_statistics.statistic_point import StatisticPointsContainer
from nncf.common.utils.backend import BackendType
from nncf.quantization.algorithms.algorithm import Algorithm
from nncf.torch.function_hook import get_hook_storage, is_wrapped, wrap_model
from nncf.torch.function_hook.hook_executor_mode import FunctionHookMode
from nncf.torch.function_hook.hook_storage import HookStorage, decode_hook_name
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper, build_nncf_graph
from nncf.torch.function_hook.wrapper import ATR_HOOK_STORAGE
from nncf.torch.layer_utils import StatefulModuleInterface
from nncf.torch.quantization.layers import AsymmetricQuantizer, BaseQuantizer, SymmetricQuantizer
from torch import nn

__all__ = [
    "ATR_HOOK_STORAGE",
    "EXTENSION_TIMEOUT",
    "QUANTIZE_NODES",
    "AggregatorBase",
    "Algorithm",
    "AsymmetricQuantizer",
    "BackendType",
    "BaseQuantizer",
    "FunctionHookMode",
    "GraphModelWrapper",
    "INPUT_NODE",
    "HookStorage",
    "NNCFGraph",
    "NNCFNode",
    "QuantizationScheme",
    "StatefulModuleInterface",
    "StatisticPointsContainer",
    "SymmetricQuantizer",
    "TensorReducerBase",
    "build_nncf_graph",
    "collectors",
    "current_mode",
    "decode_hook_name",
    "get_hook_storage",
    "hooks_of",
    "is_wrapped",
    "length_of",
    "replace_hook",
    "set_counters",
    "store_as_logarithm",
    "wrap_model",
]

QUANTIZE_NODES = ("symmetric_quantize", "asymmetric_quantize")
"""Types of the nodes that NNCF's quantizers make in its graph."""

INPUT_NODE = "nncf_model_input"
"""Type of the nodes that stand for the network's inputs in NNCF's graph."""

EXTENSION_TIMEOUT = "NNCF_EXTENSION_LOAD_TIMEOUT"
"""Environment variable: seconds that compiling NNCF's kernels may take; 0 is no limit."""


def hooks_of(model: nn.Module, kind: str, operation: str, port: int) -> tuple[nn.ModuleDict, str]:
    """Return the dictionary that holds the hooks of one place, and their key in it.

    Args:
        model: A model with NNCF's hooks.
        kind: ``"pre_hooks"`` or ``"post_hooks"``.
        operation: NNCF's name of the operation.
        port: Number of the input or output.
    """
    hooks: nn.ModuleDict = getattr(get_hook_storage(model), kind)
    return hooks, HookStorage._generate_key(operation, port)


def replace_hook(model: nn.Module, name: str, hook: nn.Module) -> None:
    """Put another hook in the place of the one that NNCF calls ``name``."""
    get_hook_storage(model).set_submodule(name, hook)


def length_of(quantizer: BaseQuantizer) -> nn.Parameter:
    """Return the parameter in which NNCF stores the length of a range."""
    name = "_input_range_param_storage" if isinstance(quantizer, AsymmetricQuantizer) else "_scale_param_storage"
    parameter: nn.Parameter = getattr(quantizer, name)
    return parameter


def store_as_logarithm(quantizer: BaseQuantizer, enabled: bool) -> None:
    """Say whether the length is stored as its logarithm; its value is the caller's to change."""
    quantizer._is_using_log_scale_storage = enabled


def function_modes() -> Iterator[FunctionHookMode]:
    """Yield the modes of NNCF that are active, outermost first."""
    modes = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return (mode for mode in modes if isinstance(mode, FunctionHookMode))


def current_mode(model: nn.Module) -> FunctionHookMode | None:
    """Return the mode that runs the hooks of ``model`` right now, if one does."""
    return next((mode for mode in function_modes() if mode.model is model), None)


def set_counters(mode: FunctionHookMode, counters: Mapping[str, int]) -> None:
    """Let NNCF go on counting like operations from ``counters``."""
    mode.op_calls.clear()
    mode.op_calls.update(counters)
