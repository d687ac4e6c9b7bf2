"""Options that several commands take, and how their words are read."""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from repapq_plugin.errors import ConfigError

PathArgument = click.Path(path_type=Path)
"""A path, as a command gets it."""


@dataclass(frozen=True)
class Common:
    """Options that every command takes.

    Args:
        cfg_options: Overrides of the config, ``KEY=VALUE``.
        work_dir: Where files are written; ``None``: by the config's name.
        threads: CPU threads for torch and OpenVINO; ``None``: all.
        device: What torch runs the model on; ``None``: what the toolbox chooses.
        launcher: What has started this process as one of several.
    """

    cfg_options: tuple[str, ...]
    work_dir: Path | None
    threads: int | None
    device: str | None = None
    launcher: str = "none"


def common_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options of `Common`."""
    for option in (
        click.option(
            "--cfg-options",
            multiple=True,
            metavar="KEY=VALUE",
            help="Override a key of the config, as the toolboxes' own tools do. Repeatable.",
        ),
        click.option(
            "-w",
            "--work-dir",
            type=PathArgument,
            help="Where files are written. [default: work_dirs/<config name>]",
        ),
        click.option(
            "--threads", type=click.IntRange(min=1), help="CPU threads for torch and OpenVINO. [default: all]"
        ),
    ):
        function = option(function)
    return function


device_option = click.option(
    "--device",
    metavar="NAME",
    help="What torch runs the model on: cpu, cuda, cuda:1. Runtimes stay on the CPU. [default: the toolbox's choice]",
)
"""Of commands that run the model."""


@dataclass(frozen=True)
class Calibrating:
    """Options of commands that calibrate: what they say in place of a config.

    Args:
        preset: Bits, by name.
        quantizer: Keys of `RepAPQConfig`, ``KEY=VALUE``.
        calib_samples: Calibration images at most.
        calib_dataloader: Dataloader of the config that they come from.
        trust_checkpoint: Run what a checkpoint says.
        checkpoint_dir: Folder that keeps finished parts.
        resume: Go on with what it keeps.
    """

    preset: str | None = None
    quantizer: tuple[str, ...] = ()
    calib_samples: int | None = None
    calib_dataloader: str | None = None
    trust_checkpoint: bool = False
    checkpoint_dir: Path | None = None
    resume: bool = False

    def overrides(self) -> dict[str, object]:
        """Return what goes before a config's own settings, as a `Workbench` takes it.

        Raises:
            ConfigError: See `pairs`.
        """
        keys = pairs(self.quantizer, "--quantizer")
        if self.preset is not None:
            keys["preset"] = self.preset
        calibration = {"num_samples": self.calib_samples, "dataloader": self.calib_dataloader}
        found: dict[str, object] = {
            "quantizer": keys,
            "calibration": {key: value for key, value in calibration.items() if value is not None},
        }
        if self.trust_checkpoint:
            found["trust_checkpoint"] = True
        if self.checkpoint_dir is not None:
            found["checkpoint_dir"] = str(self.checkpoint_dir)
        if self.resume:
            found["resume"] = True
        return found


def calibrating_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options of `Calibrating` but the two on checkpoints; the function gets them as ``calibrating``."""
    for option in (
        click.option(
            "--trust-checkpoint",
            is_flag=True,
            help="Run what CHECKPOINT says where it holds more than plain data. Only for files whose makers you know.",
        ),
        click.option(
            "--calib-dataloader",
            metavar="NAME",
            help="Dataloader of the config to calibrate from. [default: calib_dataloader if the config has one, else "
            "the training set with the test pipeline]",
        ),
        click.option("--calib-samples", type=int, help="Calibration images at most. [default: the config's, else 512]"),
        click.option(
            "-q",
            "--quantizer",
            multiple=True,
            metavar="KEY=VALUE",
            help="Override a key of RepAPQConfig, for example steps=600 or learning_rates.weight=0.003, or name "
            "another host with type=NNCF and options.target_device=CPU. Repeatable.",
        ),
        click.option(
            "--preset",
            help="Bits: w8a8, w6a6, w4a4 or any other w<bits>a<bits>; paper-w6a6 and the like take the paper's "
            "settings. [default: the config's, else w8a8]",
        ),
    ):
        function = option(function)
    keys = {item.name for item in dataclasses.fields(Calibrating)}

    @functools.wraps(function)
    def bundled(**words: Any) -> None:
        own = {key: words.pop(key) for key in keys & words.keys()}
        function(calibrating=Calibrating(**own), **words)

    return bundled


def resumable_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the two options of `Calibrating` on checkpoints; stands below `calibrating_options`."""
    for option in (
        click.option("--resume", is_flag=True, help="Go on with what that folder keeps after an interruption."),
        click.option(
            "--checkpoint-dir",
            type=PathArgument,
            help="Folder that keeps what is finished of the work until all is done. "
            "[default: the config's, else checkpoint in the work folder]",
        ),
    ):
        function = option(function)
    return function


def pairs(values: Sequence[str], option: str) -> dict[str, object]:
    """Turn ``a.b=1`` into ``{"a": {"b": 1}}``.

    Args:
        values: Words as they were given.
        option: Which option they were given to, for errors.

    Raises:
        ConfigError: A word has no key or no ``=``, or contradicts one before it.
    """
    result: dict[str, object] = {}
    for value in values:
        path, equals, text = value.partition("=")
        if not equals or not path:
            raise ConfigError(f"{option} {value!r} is not allowed; write KEY=VALUE.")
        *parents, last = path.split(".")
        place = result
        for parent in parents:
            inner = place.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{option} {value!r} is not allowed after {parent}={inner!r}; leave one of them out.")
            place = inner
        if isinstance(place.get(last), dict):
            raise ConfigError(f"{option} {value!r} is not allowed after {last}={place[last]!r}; leave one of them out.")
        try:
            place[last] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            place[last] = text
    return result
