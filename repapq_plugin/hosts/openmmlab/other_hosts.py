"""Other hosts that quantize the network part of a toolbox model, by name.

A host is found by an import path, as a string: no host imports another, and none is loaded that is not asked for.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from torch import Tensor, nn

from repapq_plugin.errors import ConfigError, HostError
from repapq_plugin.hosts.hosted import QuantizedNetwork, RunnableNetwork

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
        loader: Import path of its `LoadNetwork`, where it saves networks in a form of its own.
    """

    target: str
    formats: tuple[str, ...] = FORMATS
    loader: str = ""


HOSTS: Mapping[str, Host] = {
    "NNCF": Host(
        "repapq_plugin.hosts.nncf.hosted:quantize_network",
        ("openvino",),
        "repapq_plugin.hosts.nncf.hosted:load_network",
    ),
    "PT2E": Host("repapq_plugin.hosts.pt2e.hosted:quantize_network"),
    "TorchAO": Host("repapq_plugin.hosts.torch_ao.hosted:quantize_network"),
}
"""Each host by the name that stands in a config as ``quantizer.type``."""

SAVED_BY = {".pth": "NNCF"}
"""Which host saved a file, by the suffix; all others save a `CalibrationResult`."""


class LoadNetwork(Protocol):
    """Brings back a network that a host saved."""

    def __call__(self, path: Path, network: nn.Module, example: Tensor) -> RunnableNetwork:
        """Read ``path``.

        Args:
            path: What the host's `QuantizedNetwork.save` wrote.
            network: The float network that was quantized; its weights do not matter, and it is not changed.
            example: Images, float ``(N, C, H, W)``.

        Raises:
            HostError: It cannot be read, or belongs to another network.
        """


QuantizeNetwork = Callable[..., QuantizedNetwork]
"""``quantize(network, images, config, progress, options, checkpoints)`` quantizes a copy of a network.

Args:
    network: Images, float ``(N, C, H, W)``, to a tuple of tensors.
    images: Calibration batches of them.
    config: A `RepAPQConfig`: bits, ranges and calibration.
    progress: A `Report` or ``None``; called as the work goes on.
    options: A mapping: what else the config says to the host.
    checkpoints: A `Checkpoints`, by name; keeps what is finished. A host that does without this argument keeps nothing.
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
    if ":" not in target:
        raise ConfigError(
            f"quantizer.type={name!r} is not allowed; choose {OWN}, {', '.join(HOSTS)} or 'module:function'."
        )
    return cast(QuantizeNetwork, _imported(name, target))


def keeps_checkpoints(host: QuantizeNetwork) -> bool:
    """Whether a host takes the ``checkpoints`` of its calibration; one of the user's own need not."""
    return "checkpoints" in inspect.signature(host).parameters


def find_loader(suffix: str) -> LoadNetwork | None:
    """Return what loads a saved file of this suffix, where a host does; ``None`` where it is the plugin's own form.

    Raises:
        HostError: The host cannot be imported.
    """
    name = SAVED_BY.get(suffix)
    return None if name is None else cast(LoadNetwork, _imported(name, HOSTS[name].loader))


def _imported(name: str, target: str) -> object:
    module, _, function = target.partition(":")
    try:
        return cast(object, getattr(importlib.import_module(module), function))
    except (ImportError, AttributeError, HostError) as error:
        raise HostError(f"The host {name!r} ({target}) cannot be imported: {error}.") from error
