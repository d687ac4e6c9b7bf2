"""RepAPQ in NNCF: `nncf.quantize`'s own call, an algorithm for its pipelines, and ranges for its estimators.

From ``nncf.quantize`` to this by one import::

    from repapq_plugin.hosts.nncf import quantize

    quantized = quantize(model, nncf.Dataset(loader, transform))
"""

from repapq_plugin.errors import HostError

try:
    import nncf as _nncf  # noqa: F401
except ImportError as error:
    raise HostError("The NNCF host needs nncf: pip install 'repapq-plugin[nncf]'") from error

from repapq_plugin.hosts.nncf.algorithm import RepAPQAlgorithm
from repapq_plugin.hosts.nncf.hosted import load
from repapq_plugin.hosts.nncf.quantization import quantize, quantize_with_record
from repapq_plugin.hosts.nncf.quantizers import RangeClamp
from repapq_plugin.hosts.nncf.range_estimator import MAERange, mae_range_estimator, register

register()

__all__ = [
    "MAERange",
    "RangeClamp",
    "RepAPQAlgorithm",
    "load",
    "mae_range_estimator",
    "quantize",
    "quantize_with_record",
]
