"""What a config says about RepAPQ, checked before any work begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.checkpoints import Checkpoints
from repapq_plugin.core.ranked_checkpoints import checkpoints_in
from repapq_plugin.errors import ConfigError
from repapq_plugin.hosts.openmmlab.other_hosts import FORMATS, OWN, find_host, formats_of, keeps_checkpoints

CHECKPOINTS = "checkpoint"
"""Folder inside the work folder that keeps what is finished of a calibration."""

RUNTIME_FORMATS = {"onnxruntime": "onnx", "openvino": "openvino"}
"""Which export format each runtime is given."""

BACKENDS = ("simulated", *RUNTIME_FORMATS)
"""Where a quantized network can run: in torch, its integers simulated, or on an integer runtime."""


@dataclass(frozen=True)
class Settings:
    """RepAPQ's part of a config, as plain checked values.

    Args:
        quantizer: Keys of `RepAPQConfig`, and optionally ``preset`` (``'w6a6'``, ``'paper-w6a6'``).
        dataloader: Where calibration samples come from: the name of a dataloader in the config, a dataloader dict, or
            ``None`` for ``calib_dataloader`` if the config has one, else the training set with the test pipeline.
        num_samples: How many samples of it are used at most.
        backend: Where the result is scored, one of `BACKENDS`.
        export: Which of `FORMATS` are written.
        host: What quantizes: `OWN`, or a name that `find_host` knows.
        options: What else the host is told.
        trust_checkpoint: Run what a checkpoint says where it holds more than plain data.
        checkpoint_dir: Folder that keeps what is finished of a calibration; ``None``: `CHECKPOINTS` in the work folder.
        resume: Go on with what it keeps.

    Raises:
        ConfigError: A key or value is not allowed.
    """

    quantizer: RepAPQConfig = field(default_factory=RepAPQConfig)
    dataloader: str | Mapping[str, object] | None = None
    num_samples: int = 512
    backend: str = "simulated"
    export: tuple[str, ...] = ()
    host: str = OWN
    options: Mapping[str, object] = field(default_factory=dict)
    trust_checkpoint: bool = False
    checkpoint_dir: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.options, Mapping):
            raise ConfigError(f"quantizer.options={self.options!r} is not allowed; give a dict.")
        if self.host != OWN:
            host = find_host(self.host)
            if self.resume and not keeps_checkpoints(host):
                raise ConfigError(f"resume=True is not allowed with quantizer.type={self.host!r}, which keeps nothing.")
        elif self.options:
            raise ConfigError(f"quantizer.options={dict(self.options)!r} is not allowed without quantizer.type.")
        if not isinstance(self.trust_checkpoint, bool):
            raise ConfigError(f"trust_checkpoint={self.trust_checkpoint!r} is not allowed; choose True or False.")
        if not isinstance(self.resume, bool):
            raise ConfigError(f"resume={self.resume!r} is not allowed; choose True or False.")
        if self.checkpoint_dir is not None and (not isinstance(self.checkpoint_dir, str) or not self.checkpoint_dir):
            raise ConfigError(f"checkpoint_dir={self.checkpoint_dir!r} is not allowed; choose the path of a folder.")
        if self.backend not in BACKENDS:
            raise ConfigError(f"backend={self.backend!r} is not allowed; choose one of {', '.join(BACKENDS)}.")
        for name in self.export:
            if name not in FORMATS:
                raise ConfigError(f"export={name!r} is not allowed; choose from {', '.join(FORMATS)}.")
        for name in self.formats:
            if name not in formats_of(self.host):
                key = "export" if name in self.export else "backend"
                value = name if name in self.export else self.backend
                raise ConfigError(
                    f"{key}={value!r} is not allowed with quantizer.type={self.host!r}, whose networks are exported to "
                    f"{', '.join(formats_of(self.host))} only."
                )
        if isinstance(self.num_samples, bool) or not isinstance(self.num_samples, int) or self.num_samples < 1:
            raise ConfigError(
                f"calibration.num_samples={self.num_samples!r} is not allowed; choose a whole number of at least 1."
            )

    @property
    def formats(self) -> tuple[str, ...]:
        """What a test loop exports: what `export` names, and what `backend` is given."""
        return tuple(name for name in FORMATS if name in self.export or name == RUNTIME_FORMATS.get(self.backend))

    def checkpoints(self, folder: Path) -> Checkpoints:
        """Return what keeps finished parts of a calibration whose work folder is ``folder``.

        Raises:
            CheckpointError: See `CheckpointFolder`.
        """
        return checkpoints_in(self.checkpoint_dir or folder / CHECKPOINTS, self.resume)

    @classmethod
    def from_values(
        cls,
        quantizer: Mapping[str, object] | None = None,
        calibration: Mapping[str, object] | None = None,
        backend: str = "simulated",
        export: bool | str | Sequence[str] = (),
        trust_checkpoint: bool = False,
        checkpoint_dir: str | None = None,
        resume: bool = False,
    ) -> Settings:
        """Build settings from what stands in a config file.

        Args:
            quantizer: Keys of `RepAPQConfig`, ``preset``, and ``type`` and ``options`` for another host.
            calibration: ``dataloader`` and ``num_samples``.
            backend: See the class.
            export: True for all formats that the host writes, or their names.
            trust_checkpoint: See the class.
            checkpoint_dir: See the class.
            resume: See the class.

        Raises:
            ConfigError: A key or value is not allowed.
        """
        for key, said in (("quantizer", quantizer), ("calibration", calibration)):
            if said is not None and not isinstance(said, Mapping):
                raise ConfigError(f"{key}={said!r} is not allowed; give a dict of keys.")
        sampling = dict(calibration or {})
        unknown = sorted(set(sampling) - {"dataloader", "num_samples"})
        if unknown:
            raise ConfigError(f"calibration.{unknown[0]} is not a key; known keys: dataloader, num_samples.")
        keys = _plain(quantizer or {})
        host, options = str(keys.pop("type", OWN)), keys.pop("options", {})
        if isinstance(export, bool):
            export = formats_of(host) if export else ()
        elif isinstance(export, str):
            export = (export,)
        return cls(
            quantizer_config(keys),
            # The class checks them.
            dataloader=cast("str | Mapping[str, object] | None", sampling.get("dataloader")),
            num_samples=cast(int, sampling.get("num_samples", cls.num_samples)),
            backend=backend,
            export=tuple(export),
            host=host,
            options=cast("Mapping[str, object]", options),
            trust_checkpoint=trust_checkpoint,
            checkpoint_dir=checkpoint_dir,
            resume=resume,
        )


def quantizer_config(values: Mapping[str, object]) -> RepAPQConfig:
    """Return the quantizer's configuration from plain keys, ``preset`` among them.

    Raises:
        ConfigError: A key or value is not allowed.
    """
    plain = _plain(values)
    preset = plain.pop("preset", None)
    if preset is None:
        return RepAPQConfig.from_dict(plain)
    return RepAPQConfig.from_preset(str(preset), **plain)


def _plain(values: Mapping[str, object]) -> dict[str, object]:
    # mmengine's ConfigDict resolves attributes on access; the plugin's core wants ordinary dicts.
    return {key: _plain(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def settings_of(cfg: Mapping[str, object], **overrides: object) -> Settings:
    """Return what a config says about RepAPQ; all defaults where it says nothing.

    Read are the top-level ``repapq`` dict, or else a ``test_cfg`` of type ``RepAPQTestLoop``.

    Args:
        cfg: The whole config.
        **overrides: Keys as in those dicts that go before; ``quantizer`` and ``calibration`` are taken key by key, and
            a ``preset`` among them also goes before the config's bits.

    Raises:
        ConfigError: A key or value is not allowed.
    """
    values, where = said_of(cfg)
    for key, override in overrides.items():
        if key in ("quantizer", "calibration") and isinstance(override, Mapping):
            before = dict(cast("Mapping[str, object] | None", values.get(key)) or {})
            if "preset" in override:
                before = {name: item for name, item in before.items() if name not in ("weight_bits", "activation_bits")}
            override = {**before, **override}
        values[key] = override
    known = ("quantizer", "calibration", "backend", "export", "trust_checkpoint", "checkpoint_dir", "resume")
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}.{key} is not a key of RepAPQ; known keys: {', '.join(known)}.")
    return Settings.from_values(
        cast("Mapping[str, object] | None", values.get("quantizer")),
        cast("Mapping[str, object] | None", values.get("calibration")),
        cast(str, values.get("backend", "simulated")),
        cast("bool | str | Sequence[str]", values.get("export", ())),
        cast(bool, values.get("trust_checkpoint", False)),
        cast("str | None", values.get("checkpoint_dir")),
        cast(bool, values.get("resume", False)),
    )


def said_of(cfg: Mapping[str, object]) -> tuple[dict[str, object], str]:
    """Return what a config says about RepAPQ, and the top-level key under which it does."""
    said = cfg.get("repapq")
    if said is not None:
        return dict(cast("Mapping[str, object]", said)), "repapq"
    loop = cfg.get("test_cfg")
    if isinstance(loop, Mapping) and str(loop.get("type", "")).rpartition(".")[2] == "RepAPQTestLoop":
        return {key: loop[key] for key in loop if key not in ("type", "fp16", "_scope_")}, "test_cfg"
    return {}, "repapq"
