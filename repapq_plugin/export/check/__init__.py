"""Whether a quantized ONNX file, whoever made it, keeps the rules of a target."""

from repapq_plugin.export.check.findings import Finding, check_onnx

__all__ = ["Finding", "check_onnx"]
