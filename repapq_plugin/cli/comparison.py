"""``repapq compare``: methods side by side on one model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from repapq_plugin.cli import texts
from repapq_plugin.cli.display import Display
from repapq_plugin.cli.opening import opened
from repapq_plugin.cli.options import (
    Calibrating,
    Common,
    PathArgument,
    calibrating_options,
    common_options,
    device_option,
)
from repapq_plugin.errors import ConfigError

if TYPE_CHECKING:
    from repapq_plugin.comparison.subject import Runtime


def seeds_of(words: str) -> list[int]:
    """Return seeds from ``0,1,2``.

    Raises:
        ConfigError: A word is no whole number.
    """
    try:
        return [int(word) for word in words.split(",") if word.strip()]
    except ValueError as error:
        raise ConfigError(f"--seeds {words!r} is not allowed; write whole numbers with commas, as 0,1,2.") from error


@click.command("compare", help=texts.COMPARE_HELP)
@click.argument("config", type=PathArgument)
@click.argument("checkpoint", required=False)
@click.option("--method", "methods", multiple=True, metavar="NAME", help=texts.METHOD_HELP)
@click.option("--peer", "peers", multiple=True, metavar="NAME[:METHOD]", help=texts.PEER_HELP)
@click.option(
    "--env-dir", type=PathArgument, help="Where environments of peers are kept. [default: in the user's cache folder]"
)
@click.option("--peer-steps", type=click.IntRange(min=1), help="Steps of peers that learn. [default: the peer's own]")
@click.option("--seeds", default="0", show_default=True, help="Seeds of the learning, with commas.")
@click.option(
    "--runtime",
    type=click.Choice(("openvino", "onnxruntime", "none")),
    default="openvino",
    show_default=True,
    help="What scores and times exported networks.",
)
@click.option("--latency/--no-latency", default=True, show_default=True, help="Time exported networks.")
@calibrating_options
@device_option
@common_options
def comparison(
    config: Path,
    checkpoint: str | None,
    methods: Sequence[str],
    peers: Sequence[str],
    env_dir: Path | None,
    peer_steps: int | None,
    seeds: str,
    runtime: Runtime,
    latency: bool,
    calibrating: Calibrating,
    device: str | None,
    cfg_options: tuple[str, ...],
    work_dir: Path | None,
    threads: int | None,
) -> None:
    """Compare methods, and show one table."""
    from repapq_plugin.comparison.methods import chosen_methods
    from repapq_plugin.comparison.peers import PeerOptions
    from repapq_plugin.comparison.show import lines_below, shown_table
    from repapq_plugin.export.openvino import require_openvino

    # What is not allowed shall be noticed before the work, not after.
    chosen_methods(methods)
    others = PeerOptions(peers, env_dir, peer_steps)
    others.chosen()
    wanted, overrides = seeds_of(seeds), calibrating.overrides()
    if runtime == "openvino":
        require_openvino()
    display, common = Display(), Common(cfg_options, work_dir, threads, device)
    with opened(display, config, common, checkpoint, overrides=overrides) as bench:
        # A host, which the package and its command must not load before they know that it is wanted.
        from repapq_plugin.hosts.openmmlab.comparing import compare_on_bench

        table, folder = compare_on_bench(bench, display.step, methods, wanted, runtime, latency=latency, peers=others)
    display.table(shown_table(table))
    for line in lines_below(table):
        display.line(line)
    display.line(f"wrote {folder}")
