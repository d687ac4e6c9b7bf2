"""torchao's pt2e: our observers and fake quantizers on torchao's bases, a `Quantizer`, and learned graphs."""

from repapq_plugin.errors import HostError

try:
    import torchao.quantization.pt2e  # noqa: F401
except (ImportError, AttributeError) as error:  # the latter where torch is too old for torchao
    raise HostError(
        f"This host needs torchao>=0.18 and a torch that it fits ({error}): pip install 'repapq-plugin[pt2e]'"
    ) from error

from repapq_plugin.hosts.pt2e.backend import Pt2eBackend
from repapq_plugin.hosts.pt2e.fake_quantize import LearnableFakeQuantize, PerChannelLearnableFakeQuantize
from repapq_plugin.hosts.pt2e.grid import carry_grid
from repapq_plugin.hosts.pt2e.learned import carry_over, prepare_learned
from repapq_plugin.hosts.pt2e.observers import (
    MAEObserver,
    MinMaxObserver,
    MSEObserver,
    PercentileObserver,
    PerChannelMinMaxObserver,
    PerChannelMSEObserver,
)
from repapq_plugin.hosts.pt2e.quantizer import RepAPQQuantizer, x86_inductor_quantizer
from repapq_plugin.hosts.pt2e.simulated import quantized_network

__all__ = [
    "LearnableFakeQuantize",
    "MAEObserver",
    "MSEObserver",
    "MinMaxObserver",
    "PerChannelLearnableFakeQuantize",
    "PerChannelMSEObserver",
    "PerChannelMinMaxObserver",
    "PercentileObserver",
    "Pt2eBackend",
    "RepAPQQuantizer",
    "carry_grid",
    "carry_over",
    "prepare_learned",
    "quantized_network",
    "x86_inductor_quantizer",
]
