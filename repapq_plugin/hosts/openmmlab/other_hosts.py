"""Other hosts that quantize the network part of a toolbox model, by name.

A host is found by an import path, as a string: no host imports another, and none is loaded that is not asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor, nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.errors import ConfigError, HostError
from repapq_plugin.hosts.hosted import QuantizedNetwork
from repapq_plugin.job import Progress

OWN = "RepAPQ"
"""The plugin's own quantizers, which need no other host."""

FORMATS = ("onnx", "openvino")
"""What a quantized network can be exported to."""


@dataclass(frozen=True)
class Host:
    """Where a host is found, and what it can write.

    Args:
        target: Import path of its `QuantizeNetwork`, ``module:function``.
        formats: Which of `FORMATS` its networks can be exported to.
    """

    target: str
    formats: tuple[str, ...] = FORMATS


HOSTS: Mapping[str, Host] = {
    "NNCF": Host("repapq_plugin.hosts.nncf.hosted:quantize_network", formats=("openvino",)),
    "PT2E": Host("repapq_plugin.hosts.pt2e.hosted:quantize_network"),
    "TorchAO": Host("repapq_plugin.hosts.torch_ao.hosted:quantize_network"),
}
"""Each host by the name that stands in a config as ``quantizer.type``."""


class QuantizeNetwork(Protocol):
    """Quantizes a network on preprocessed images."""

    def __call__(
        self,
        network: nn.Module,
        images: Sequence[Tensor],
        config: RepAPQConfig,
        progress: Callable[[Progress], None] | None,
        options: Mapping[str, object],
    ) -> QuantizedNetwork:
        """Quantize a copy of ``network``.

        Args:
            network: Images, float ``(N, C, H, W)``, to a tuple of tensors.
            images: Calibration batches of them.
            config: Bits, ranges and calibration.
            progress: Called as the work goes on.
            options: What else the config says to the host.
        """


def formats_of(name: str) -> tuple[str, ...]:
    """Return which of `FORMATS` a host's networks can be exported to; all, for `OWN` and for an import path."""
    return HOSTS[name].formats if name in HOSTS else FORMATS


def find_host(name: str) -> QuantizeNetwork:
    """Return what quantizes, by a host's name in `HOSTS` or by an import path ``module:function``.

    Raises:
        ConfigError: There is no such host.
        HostError: It cannot be imported.
    """
    target = HOSTS[name].target if name in HOSTS else name
    module, separator, function = target.partition(":")
    if not separator:
        raise ConfigError(
            f"quantizer.type={name!r} is not allowed; choose {OWN}, {', '.join(HOSTS)} or 'module:function'."
        )
    try:
        return cast(QuantizeNetwork, getattr(importlib.import_module(module), function))
    except (ImportError, AttributeError) as error:
        raise HostError(f"The host {name!r} ({target}) cannot be imported: {error}.") from error
