"""RepAPQ: post-training quantization of reparameterized networks, as a plugin.

Importing this package loads no host toolbox and registers nothing in one; the packages in `repapq_plugin.hosts` do.
"""

from repapq_plugin import _moved as _moved
from repapq_plugin.config import LearningRates, RepAPQConfig
from repapq_plugin.errors import RepAPQError
from repapq_plugin.export.openvino import export_openvino
from repapq_plugin.export.qdq_onnx import export_onnx
from repapq_plugin.job import Progress, quantize_model
from repapq_plugin.method.unit_result import UnitResult
from repapq_plugin.observers import MAEObserver, MinMaxObserver, MSEObserver, PercentileObserver
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize, PerChannelLearnableFakeQuantize
from repapq_plugin.reparam.branches import Branch, BranchSpec, register_branches
from repapq_plugin.result import CalibrationResult
from repapq_plugin.targets import Target

__version__ = "0.1.0"

__all__ = [
    "Branch",
    "BranchSpec",
    "CalibrationResult",
    "LearnableFakeQuantize",
    "LearningRates",
    "MAEObserver",
    "MSEObserver",
    "MinMaxObserver",
    "PerChannelLearnableFakeQuantize",
    "PercentileObserver",
    "Progress",
    "RepAPQConfig",
    "RepAPQError",
    "Target",
    "UnitResult",
    "export_onnx",
    "export_openvino",
    "quantize_model",
    "register_branches",
]
