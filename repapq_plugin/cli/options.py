"""Options that several commands take, and how their words are read."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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
