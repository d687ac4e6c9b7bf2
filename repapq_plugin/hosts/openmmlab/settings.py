"""What a config says about RepAPQ, checked before any work begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.errors import ConfigError
from repapq_plugin.hosts.openmmlab.other_hosts import OWN, find_engine

BACKENDS = ("simulated", "onnxruntime", "openvino")
"""Where a quantized network can run: in torch, its integers simulated, or on an integer runtime."""

FORMATS = ("onnx", "openvino")
"""What a quantized network can be exported to."""


@dataclass(frozen=True)
class Settings:
    """RepAPQ's part of a config, as plain checked values.

    Args:
        quantizer: Keys of `RepAPQConfig`, and optionally ``preset`` (``'w6a6'``).
        dataloader: Where calibration samples come from: the name of a dataloader in the config, a
            dataloader dict, or ``None`` for ``calib_dataloader`` if the config has one, else the
            training set with the test pipeline.
        num_samples: How many samples of it are used at most.
        backend: Where the result is scored, one of `BACKENDS`.
        export: Which of `FORMATS` are written.
        engine: What quantizes: `OWN`, or a name that `find_engine` knows.
        options: What else the engine is told.

    Raises:
        ConfigError: A key or value is not allowed.
    """

    quantizer: RepAPQConfig = field(default_factory=RepAPQConfig)
    dataloader: str | Mapping[str, Any] | None = None
    num_samples: int = 512
    backend: str = "simulated"
    export: tuple[str, ...] = ()
    engine: str = OWN
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.engine != OWN:
            find_engine(self.engine)
        elif self.options:
            raise ConfigError(f"quantizer.options={dict(self.options)!r} is not allowed without quantizer.type.")
        if self.backend not in BACKENDS:
            raise ConfigError(f"backend={self.backend!r} is not allowed; choose one of {', '.join(BACKENDS)}.")
        for name in self.export:
            if name not in FORMATS:
                raise ConfigError(f"export={name!r} is not allowed; choose from {', '.join(FORMATS)}.")
        if isinstance(self.num_samples, bool) or not isinstance(self.num_samples, int) or self.num_samples < 1:
            raise ConfigError(
                f"calibration.num_samples={self.num_samples!r} is not allowed; choose a whole number of at least 1."
            )

    @classmethod
    def from_values(
        cls,
        quantizer: Mapping[str, Any] | None = None,
        calibration: Mapping[str, Any] | None = None,
        backend: str = "simulated",
        export: bool | str | Sequence[str] = (),
    ) -> Settings:
        """Build settings from what stands in a config file.

        Args:
            quantizer: Keys of `RepAPQConfig`, ``preset``, and ``type`` and ``options`` for another engine.
            calibration: ``dataloader`` and ``num_samples``.
            backend: See the class.
            export: True for all formats, or their names.
        """
        calibration = dict(calibration or {})
        unknown = sorted(set(calibration) - {"dataloader", "num_samples"})
        if unknown:
            raise ConfigError(f"calibration.{unknown[0]} is not a key; known keys: dataloader, num_samples.")
        if isinstance(export, bool):
            export = FORMATS if export else ()
        elif isinstance(export, str):
            export = (export,)
        keys = _plain(quantizer or {})
        engine, options = keys.pop("type", OWN), keys.pop("options", {})
        return cls(
            quantizer_config(keys),
            backend=backend,
            export=tuple(export),
            engine=str(engine),
            options=options,
            **calibration,
        )


def quantizer_config(values: Mapping[str, Any]) -> RepAPQConfig:
    """Return the quantizer's configuration from plain keys, ``preset`` among them."""
    plain = _plain(values)
    preset = plain.pop("preset", None)
    if preset is None:
        return RepAPQConfig.from_dict(plain)
    return RepAPQConfig.from_preset(str(preset), **plain)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    # mmengine's ConfigDict resolves attributes on access; the plugin's core wants ordinary dicts.
    return {key: _plain(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def settings_of(cfg: Mapping[str, Any], **overrides: Any) -> Settings:
    """Return what a config says about RepAPQ; all defaults where it says nothing.

    Read are the top-level ``repapq`` dict, or else a ``test_cfg`` of type ``RepAPQTestLoop``.

    Args:
        cfg: The whole config.
        **overrides: Keys as in those dicts that go before; ``quantizer`` and ``calibration`` are
            taken key by key, and a ``preset`` among them also goes before the config's bits.

    Raises:
        ConfigError: A key or value is not allowed.
    """
    values, where = _said(cfg)
    for key, override in overrides.items():
        if key in ("quantizer", "calibration"):
            before = dict(values.get(key) or {})
            if "preset" in override:
                before = {name: item for name, item in before.items() if name not in ("weight_bits", "activation_bits")}
            override = {**before, **override}
        values[key] = override
    known = ("quantizer", "calibration", "backend", "export")
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}.{key} is not a key of RepAPQ; known keys: {', '.join(known)}.")
    return Settings.from_values(**values)


def _said(cfg: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    if cfg.get("repapq") is not None:
        return dict(cfg["repapq"]), "repapq"
    test_cfg = cfg.get("test_cfg") or {}
    if str(test_cfg.get("type", "")).rpartition(".")[2] == "RepAPQTestLoop":
        return {key: test_cfg[key] for key in test_cfg if key not in ("type", "fp16", "_scope_")}, "test_cfg"
    return {}, "repapq"
