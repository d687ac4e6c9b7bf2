"""From a calibrated model to files that integer runtimes execute."""

from repapq_plugin.export.deploy import deployable
from repapq_plugin.export.executorch import ExecuTorchSummary, export_executorch
from repapq_plugin.export.litert import LiteRTSummary, export_litert
from repapq_plugin.export.openvino import OpenVINOSummary, check_int8, export_openvino, int8_layers
from repapq_plugin.export.program import QuantizedProgram, load_program, quantized_program
from repapq_plugin.export.qdq_onnx import OnnxSummary, export_onnx

__all__ = [
    "ExecuTorchSummary",
    "LiteRTSummary",
    "OnnxSummary",
    "OpenVINOSummary",
    "QuantizedProgram",
    "check_int8",
    "deployable",
    "export_executorch",
    "export_litert",
    "export_onnx",
    "export_openvino",
    "int8_layers",
    "load_program",
    "quantized_program",
]
