"""`Origin`: how a file was made. It stands in the file itself, so that nobody has to say it again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.errors import RepAPQError, ResultError

KEY = "repapq"
"""Under which name a file keeps its origin: in ONNX's properties, in OpenVINO's ``rt_info``, in a header."""

FORMAT = "repapq-origin-1"
"""How the text is put together."""


@dataclass(frozen=True)
class Decoding:
    """What a file that holds a whole detector leaves to whoever runs it: boxes are those of its input.

    Args:
        image_shape: Height and width, in pixels, that boxes were clamped to; ``None`` if to the whole input, or not.
        clamp: Whether boxes are clamped to the original image once they are scaled back to it.
    """

    image_shape: tuple[int, int] | None = None
    clamp: bool = False


@dataclass(frozen=True)
class Origin:
    """How a file was made.

    Args:
        quantizer: Bits, target and calibration; ``None`` where nobody knows.
        host: What quantized: ``RepAPQ`` or another host's name.
        config: Path of the toolbox config; empty without one.
        cfg_options: Overrides of that config, ``KEY=VALUE``.
        checkpoint: Name of the file with the float weights, without its folder.
        versions: Of the packages that took part.
        decoding: Set where the file holds the whole detector, boxes out.
    """

    quantizer: RepAPQConfig | None = None
    host: str = ""
    config: str = ""
    cfg_options: tuple[str, ...] = ()
    checkpoint: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    decoding: Decoding | None = None

    @property
    def reduce_range(self) -> bool:
        """Whether weights of 8 bits are known to use 7."""
        return self.quantizer is not None and self.quantizer.reduce_range

    def to_text(self) -> str:
        """Return the origin as JSON; scheme, target and reduced range stand beside the quantizer's keys for readers."""
        values: dict[str, object] = {"format": FORMAT}
        if self.quantizer is not None:
            target = self.quantizer.runs_on
            values |= {"scheme": self.quantizer.scheme, "target": target.name, "reduce_range": self.reduce_range}
        values |= dataclasses.asdict(self)
        values["quantizer"] = None if self.quantizer is None else self.quantizer.to_dict()
        return json.dumps(values, default=str, allow_nan=False)

    @classmethod
    def from_text(cls, text: str, source: str) -> Origin:
        """Read what `to_text` wrote.

        Args:
            text: JSON.
            source: What to call the file in errors.

        Raises:
            ResultError: It is damaged, or of a version of this package that is not known here.
        """
        try:
            values = json.loads(text)
            if values["format"] != FORMAT:
                raise ValueError(f"format {values['format']!r}")
            said, decoding = values["quantizer"], values["decoding"]
            shape = decoding and decoding["image_shape"]
            return cls(
                None if said is None else RepAPQConfig.from_dict(said),
                str(values["host"]),
                str(values["config"]),
                tuple(map(str, values["cfg_options"])),
                str(values["checkpoint"]),
                {str(name): str(version) for name, version in values["versions"].items()},
                decoding and Decoding(shape and (int(shape[0]), int(shape[1])), bool(decoding["clamp"])),
            )
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, RepAPQError) as error:
            raise ResultError(
                f"What {source} says of how it was made cannot be read ({type(error).__name__}: {error}). It is "
                "damaged or was made by another version of this package; export it again."
            ) from error

    def lines(self) -> Iterator[str]:
        """Yield how the file was made, for people, line by line."""
        if self.quantizer is not None:
            target = self.quantizer.runs_on.name
            reduced = "7 of 8 bits" if self.reduce_range else "all bits"
            yield f"scheme: {self.quantizer.scheme}"
            yield f"target: {target}; weights use {reduced}; quantized by {self.host or 'RepAPQ'}"
        if self.config:
            options = f", with {' '.join(self.cfg_options)}" if self.cfg_options else ""
            yield f"config: {self.config}{options}"
        if self.checkpoint:
            yield f"checkpoint: {self.checkpoint}"
        if self.decoding is not None:
            yield "holds: the whole detector, boxes out"
        if self.versions:
            yield f"versions: {', '.join(f'{name} {version}' for name, version in self.versions.items())}"


def origin_of(result: object) -> Origin | None:
    """Return what a calibration result says of itself; ``None`` of anything without a configuration."""
    config = getattr(result, "config", None)
    return Origin(config, "RepAPQ", versions=own_versions()) if isinstance(config, RepAPQConfig) else None


def own_versions() -> dict[str, str]:
    """Return the versions of this package and of torch, by import name."""
    return {
        name: found
        for name, distribution in (("repapq_plugin", "repapq-plugin"), ("torch", "torch"))
        if (found := _version(distribution))
    }


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:  # runs from a checkout that is not installed
        return ""
