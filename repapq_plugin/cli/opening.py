"""What commands on a config begin with: its model and its work folder are opened; and what an interruption says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from repapq_plugin.cli.devices import device_named
from repapq_plugin.cli.display import Display
from repapq_plugin.cli.options import Common
from repapq_plugin.errors import HostError

if TYPE_CHECKING:
    from repapq_plugin.core.checkpoints import Checkpoints
    from repapq_plugin.hosts.openmmlab.workbench import Workbench


@contextlib.contextmanager
def opened(
    display: Display,
    config: Path,
    common: Common,
    checkpoint: str | None = None,
    *,
    seed: int | None = None,
    need_weights: bool = True,
    need_scores: bool = True,
    overrides: Mapping[str, object] | None = None,
) -> Iterator[Workbench]:
    """Open config, model and work folder, with bars shown and the toolbox kept quiet until the end."""
    # Before the toolboxes are imported, which takes seconds.
    if not config.is_file():
        raise HostError(f"The config {config} does not exist.")
    import torch

    from repapq_plugin.core.ranks import world
    from repapq_plugin.hosts.openmmlab.launching import join_group
    from repapq_plugin.hosts.openmmlab.work import writable_folder
    from repapq_plugin.hosts.openmmlab.workbench import Workbench, open_config

    join_group(common.launcher)
    if world().rank:
        display.hide()
    device = None if common.device is None else device_named(common.device)
    if common.threads is not None:
        torch.set_num_threads(common.threads)
    folder = writable_folder(common.work_dir or Path("work_dirs") / config.stem)
    with display.working(folder):
        with display.step("load_model", "Loading the model"):
            bench = Workbench(
                open_config(config, common.cfg_options),
                checkpoint,
                folder,
                seed=seed,
                need_weights=need_weights,
                need_scores=need_scores,
                overrides=overrides,
                device=device,
                cfg_options=common.cfg_options,
            )
        yield bench


class Resumable(click.Abort):
    """The user interrupted what can be gone on with; the text says what is kept."""


@contextlib.contextmanager
def resumable(checkpoints: Checkpoints) -> Iterator[None]:
    """Let an interruption say what is kept, if anything is."""
    try:
        yield
    except KeyboardInterrupt as error:
        if not checkpoints.finished:
            raise
        raise Resumable(f"Finished parts of the calibration are kept: {len(checkpoints.finished)}.") from error
