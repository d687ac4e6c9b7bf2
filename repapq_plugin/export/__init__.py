"""From a calibrated model to files that integer runtimes execute."""

from repapq_plugin.export.deploy import deployable
from repapq_plugin.export.openvino import OpenVINOSummary, check_int8, export_openvino, int8_layers
from repapq_plugin.export.qdq_onnx import OnnxSummary, export_onnx

__all__ = [
    "OnnxSummary",
    "OpenVINOSummary",
    "check_int8",
    "deployable",
    "export_onnx",
    "export_openvino",
    "int8_layers",
]
