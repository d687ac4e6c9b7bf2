"""Other engines than the plugin's own, by name: what quantizes the network part of a toolbox model.

An engine is found by an import path, as a string: no host imports another, and none is loaded that is not asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor, nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.errors import ConfigError, HostError
from repapq_plugin.export.openvino import OpenVINOSummary
from repapq_plugin.export.qdq_onnx import OnnxSummary
from repapq_plugin.job import Progress
from repapq_plugin.result import CalibrationResult

OWN = "RepAPQ"
"""The plugin's own quantizers, which need no engine."""

ENGINES = {
    "NNCF": "repapq_plugin.hosts.nncf.hosted:quantize_network",
    "PT2E": "repapq_plugin.hosts.pt2e.hosted:quantize_network",
    "TorchAO": "repapq_plugin.hosts.torch_ao.hosted:quantize_network",
}
"""Import path of each engine, ``module:function``, by the name that stands in a config."""


class QuantizedNetwork(Protocol):
    """What an engine returns.

    Attributes:
        network: Runs in place of the float network: images to its raw outputs, laid flat.
        result: The record of how it came about.
    """

    @property
    def network(self) -> nn.Module:
        """See the class."""

    @property
    def result(self) -> CalibrationResult:
        """See the class."""

    def save(self, folder: Path) -> list[Path]:
        """Write what brings the network back into ``folder``; return the files."""

    def export(self, kind: str, example: Tensor, path: Path) -> OnnxSummary | OpenVINOSummary:
        """Write it for a runtime; ``kind`` is ``'onnx'`` or ``'openvino'``, ``path`` has no suffix.

        Raises:
            ExportError: The engine has no such export.
        """


class Engine(Protocol):
    """Quantizes a network on prepared images."""

    def __call__(
        self,
        network: nn.Module,
        images: Sequence[Tensor],
        config: RepAPQConfig,
        progress: Callable[[Progress], None] | None,
        options: Mapping[str, Any],
    ) -> QuantizedNetwork:
        """Quantize a copy of ``network``.

        Args:
            network: Images, float ``(N, C, H, W)``, to a tuple of tensors.
            images: Calibration batches of them.
            config: Bits, ranges and calibration.
            progress: Called as the work goes on.
            options: What else the config says to the engine.
        """


def find_engine(name: str) -> Engine:
    """Return an engine by its name in `ENGINES`, or by an import path ``module:function``.

    Raises:
        ConfigError: There is no such engine.
        HostError: It cannot be imported.
    """
    target = ENGINES.get(name, name)
    module, separator, function = target.partition(":")
    if not separator:
        raise ConfigError(
            f"quantizer.type={name!r} is not allowed; choose {OWN}, {', '.join(ENGINES)} or 'module:function'."
        )
    try:
        return cast(Engine, getattr(importlib.import_module(module), function))
    except (ImportError, AttributeError) as error:
        raise HostError(f"The engine {name!r} ({target}) cannot be imported: {error}.") from error
