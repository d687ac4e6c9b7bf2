"""``repapq eval`` and ``repapq export``: what is done with a result, by itself or with its config said again."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click

from repapq_plugin.cli import texts
from repapq_plugin.cli.display import Display
from repapq_plugin.cli.lowering import format_of
from repapq_plugin.cli.opening import opened
from repapq_plugin.cli.options import Common, PathArgument, common_options, device_option
from repapq_plugin.core.origin import Origin
from repapq_plugin.errors import ConfigError, ResultError

BACKEND_OF = {".safetensors": "simulated", ".pth": "simulated", ".onnx": "onnxruntime", ".xml": "openvino"}
"""What runs a result unless somebody says otherwise, by the suffix of its file."""

FORMATS = ("onnx", "openvino", "executorch", "litert", "program")
"""What `export` writes; a program is for `lower`."""

DECODING_FORMATS = ("onnx", "openvino")
"""Of these, what takes a whole detector."""

NAMES_CODE = re.compile(r"\b(type|imports|custom_imports|default_scope|_scope_|_base_)\b")
"""What an override says that lets a toolbox import or call something."""

paths_argument = click.argument("paths", nargs=-1, required=True, type=PathArgument, metavar="[CONFIG] RESULT")
"""A result, and its config where the file does not say it."""


@dataclass(frozen=True)
class Named:
    """What a command is about.

    Args:
        config: The toolbox config.
        result: The file.
        cfg_options: Overrides of the config.
        origin: How the file was made; ``None`` where it does not say.
    """

    config: Path
    result: Path
    cfg_options: tuple[str, ...]
    origin: Origin | None


def kind_of(result: Path) -> str:
    """Return what runs a result unless somebody says otherwise.

    Raises:
        ConfigError: It is no result.
    """
    if result.suffix in BACKEND_OF:
        return BACKEND_OF[result.suffix]
    raise ConfigError(f"{result.name} is not a result; give a file ending in {', '.join(BACKEND_OF)}.")


def named(paths: Sequence[Path], command: str, cfg_options: tuple[str, ...]) -> Named:
    """Return what the words of a command name, its config read from the file where it is not said.

    Args:
        paths: ``[CONFIG] RESULT``.
        command: ``eval`` or ``export``, for errors.
        cfg_options: Overrides that were given.

    Raises:
        click.UsageError: There are more words, or a config alone.
        ConfigError: The file does not say its config, or that is gone.
        ResultError: The file cannot be read.
    """
    from repapq_plugin.export.origins import read_origin

    if len(paths) > 2 or (len(paths) == 1 and paths[0].suffix == ".py"):
        given = " ".join(map(str, paths))
        raise click.UsageError(f"{given!r} is not [CONFIG] RESULT; RESULT ends in {', '.join(BACKEND_OF)}.")
    result = paths[-1]
    kind_of(result)
    if len(paths) == 2:
        try:
            origin = read_origin(result) if result.is_file() else None
        except ResultError:  # the config was said: whether the file can be used is seen when it is opened
            origin = None
        return Named(paths[0], result, cfg_options, origin)
    origin = read_origin(result)
    again = f"repapq {command} CONFIG {result}"
    if origin is None or not origin.config:
        what = "how it was made" if origin is None else "which config it belongs to"
        raise ConfigError(f"{result.name} does not say {what}; give its config: {again}.")
    if not Path(origin.config).is_file():
        raise ConfigError(
            f"{result.name} was made from the config {origin.config}, which does not exist here; give it: {again}."
        )
    return Named(Path(origin.config), result, (*_kept(origin, result, cfg_options), *cfg_options), origin)


def _kept(origin: Origin, result: Path, cfg_options: Sequence[str]) -> list[str]:
    """Return the overrides that a file was made with and that are not given anew.

    Raises:
        ConfigError: One could run something that the config does not; a file must not bring that along.
    """
    given = {option.partition("=")[0] for option in cfg_options}
    kept = [option for option in origin.cfg_options if option.partition("=")[0] not in given]
    for option in kept:
        if NAMES_CODE.search(option):
            raise ConfigError(
                f"{result.name} was made with --cfg-options {option!r}, which names what is to be imported or called. "
                "That is not taken from a file; give the option again if you know who made it."
            )
    return kept


@click.command("eval", help=texts.EVAL_HELP)
@paths_argument
@click.option(
    "--backend",
    type=click.Choice(("simulated", "onnxruntime", "openvino")),
    help="What runs the network part. [default: by the file: .onnx onnxruntime, .xml openvino, else simulated]",
)
@device_option
@common_options
def evaluate(
    paths: tuple[Path, ...],
    backend: str | None,
    device: str | None,
    cfg_options: tuple[str, ...],
    work_dir: Path | None,
    threads: int | None,
) -> None:
    """Score a result with the toolbox's own metric."""
    it = named(paths, "eval", cfg_options)
    kind = kind_of(it.result)
    backend = backend or kind
    if backend == "simulated" and kind != "simulated":
        raise ConfigError(f"--backend simulated needs a .safetensors or .pth result, not {it.result.name}.")
    display, common = Display(), Common(it.cfg_options, work_dir, threads, device)
    with (
        tempfile.TemporaryDirectory() as temporary,
        opened(display, it.config, common, need_weights=False) as bench,
    ):
        from repapq_plugin.hosts.openmmlab.scoring import score_result

        metrics, notes = score_result(bench, it.result, backend, display.step, Path(temporary), it.origin)
    for line in it.origin.lines() if it.origin is not None else ():
        display.line(line)
    for key, value in metrics.items():
        display.line(f"{key}: {value}")
    for note in notes:
        display.line(f"note: {note}")


@click.command(help=texts.EXPORT_HELP)
@paths_argument
@click.option("--format", "kind", type=click.Choice(FORMATS), help="[default: by the suffix of --out, else onnx]")
@click.option("-o", "--out", type=PathArgument, help=texts.OUT_HELP)
@click.option(
    "--with-decoding",
    is_flag=True,
    help="Write the whole detector: one image in, boxes, scores and labels out, decoded and suppressed in float.",
)
@common_options
def export(
    paths: tuple[Path, ...],
    kind: str | None,
    out: Path | None,
    with_decoding: bool,
    cfg_options: tuple[str, ...],
    work_dir: Path | None,
    threads: int | None,
) -> None:
    """Write a result for a runtime."""
    from repapq_plugin.hosts.openmmlab.work import SUFFIXES

    it, kind = named(paths, "export", cfg_options), kind or format_of(out)
    if kind_of(it.result) != "simulated":
        raise ConfigError(f"{it.result.name} is exported already; give the .safetensors or .pth result.")
    if with_decoding and it.result.suffix == ".pth":
        raise ConfigError("--with-decoding is not allowed with NNCF's networks, which are not exported to ONNX.")
    if with_decoding and kind not in DECODING_FORMATS:
        allowed = " or ".join(DECODING_FORMATS)
        raise ConfigError(f"--format {kind} is not allowed with --with-decoding; choose {allowed}.")
    whole = "-detector" if with_decoding else ""
    target = out or it.result.with_name(f"{it.result.stem}{whole}{SUFFIXES[kind]}")
    if target.suffix != SUFFIXES[kind]:
        raise ConfigError(f"--out {target.name!r} is not allowed with --format {kind}; end it in {SUFFIXES[kind]}.")
    display, common = Display(), Common(it.cfg_options, work_dir, threads)
    with opened(display, it.config, common, need_weights=False, need_scores=False) as bench:
        from repapq_plugin.hosts.openmmlab.steps import load_quantized

        quantized = load_quantized(it.result, bench.model, lambda: bench.example)
        origin = it.origin
        if origin is not None and len(paths) == 2:  # what was said goes before what the file says
            origin = replace(origin, config=str(it.config.resolve()), cfg_options=it.cfg_options)
        with display.step("export", f"Exporting {kind}"):
            if with_decoding:
                from repapq_plugin.hosts.openmmlab.detectors import export_detector

                known = origin or Origin(None if quantized.result is None else quantized.result.config)
                known = replace(known, config=str(it.config.resolve()), cfg_options=it.cfg_options)
                path = target.with_suffix("")
                exported = export_detector(quantized, bench.example, bench.image_shape, path, kind, known)
            else:
                exported = quantized.export(kind, bench.example, target.with_suffix(""), origin)
    for path in exported.files:
        display.line(f"wrote {path}")
