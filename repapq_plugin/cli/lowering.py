"""``repapq lower``: files for phones, made of a program where no toolbox is; and what format a name asks for."""

from __future__ import annotations

from pathlib import Path

import click

from repapq_plugin.cli import texts
from repapq_plugin.cli.options import PathArgument
from repapq_plugin.errors import ConfigError

SUFFIXES = (".pte", ".tflite")
"""What the names of files for phones end in: ExecuTorch's, LiteRT's."""


def format_of(out: Path | None) -> str:
    """Return the format that the name of a file asks for; ``onnx`` where there is none, or another one."""
    from repapq_plugin.hosts.openmmlab.work import SUFFIXES

    return next((kind for kind, suffix in SUFFIXES.items() if out is not None and out.suffix == suffix), "onnx")


@click.command(help=texts.LOWER_HELP)
@click.argument("program", type=PathArgument)
@click.argument("out", type=PathArgument)
def lower(program: Path, out: Path) -> None:
    """Write a program for ExecuTorch or LiteRT."""
    from repapq_plugin.export.executorch import export_executorch
    from repapq_plugin.export.litert import export_litert

    if out.suffix not in SUFFIXES:
        raise ConfigError(f"OUT={out.name!r} is not allowed; end it in {' or '.join(SUFFIXES)}.")
    written = export_executorch(program, None, out) if out.suffix == SUFFIXES[0] else export_litert(program, None, out)
    for note in written.notes:
        click.echo(f"note: {note}")
    click.echo(f"{written.integer_layers} of {written.layers} layers compute in 8-bit integers")
    click.echo(f"wrote {written.path}")
