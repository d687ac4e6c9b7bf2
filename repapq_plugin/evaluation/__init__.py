"""Running exported networks: as modules that a toolbox can score, and against the clock."""

from repapq_plugin.evaluation.latency import LatencyReport, measure_latency
from repapq_plugin.evaluation.runtimes import OnnxRuntimeNetwork, OpenVINONetwork

__all__ = ["LatencyReport", "OnnxRuntimeNetwork", "OpenVINONetwork", "measure_latency"]
