"""Why a network loses by quantization: what its activations hold, and which channels and samples stand out."""

from repapq_plugin.diagnosis.measure import diagnose as diagnose
from repapq_plugin.diagnosis.table import Diagnosis as Diagnosis
from repapq_plugin.diagnosis.table import UnitDiagnosis as UnitDiagnosis
