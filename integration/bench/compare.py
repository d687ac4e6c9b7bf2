"""Every method side by side on the reference classifiers, and real peers in environments of their own.

    python -m integration.bench.compare --model repvgg --preset w4a4 --seeds 0

All methods quantize the same merged float network with the same 512 calibration images of the shipped subset; the
seed decides over the learning alone. Scores are of the 2,000 test images that ship (``--source full``: of all 10,000),
simulated and in integers on OpenVINO. Seconds are processor time of the calibrating process, all threads together, so
that a loaded machine does not show in them; nothing is timed by the wall. Results go to ``results/compare.json`` after
every row; rows that are in the work folder already are not made again. ``--split val`` is for choosing.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from integration.bench.reference import (
    RESULTS,
    calibration_batches,
    environment,
    images_and_labels,
    load_classifier,
    write_result,
)
from repapq_plugin import Progress, RepAPQConfig
from repapq_plugin.comparison import Comparison, compare
from repapq_plugin.comparison.peers import PeerOptions
from repapq_plugin.comparison.table import TABLE_FILE
from repapq_plugin.hosts.openmmlab.network import TensorPath

SCORED = 250
"""Images of a batch that is scored."""


def top1(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return top-1 accuracy in percent of what takes images and returns logits, alone or in a tuple."""
    right = 0
    for batch, truth in zip(images.split(SCORED), labels.split(SCORED), strict=True):
        outputs = network(batch)
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        right += int((logits.argmax(1) == truth).sum())
    return 100 * right / len(labels)


def rows_of(table: Comparison, **about: object) -> list[dict[str, Any]]:
    """Return what is kept of a comparison: its rows without machines' paths."""
    kept = []
    for row in table.rows:
        said = {key: value for key, value in asdict(row).items() if value or value == 0 and value is not False}
        kept.append({**about, "float": table.floats["top-1 %"], "common_scheme": table.scheme, **said})
    return kept


def keep(table: Comparison, name: str, about: dict[str, Any]) -> None:
    """Put the rows of a comparison into the results, in the place of those of the same network and bits."""
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    others = [row for row in rows if any(row[key] != value for key, value in about.items())]
    write_result(name, {"environment": environment(), "rows": [*others, *rows_of(table, **about)]})


@click.command()
@click.option("--model", "names", multiple=True, default=("repvgg", "mobileone"), help="Which classifiers.")
@click.option("--preset", "presets", multiple=True, default=("w4a4", "w6a6"), help="Which bits.")
@click.option("--method", "methods", multiple=True, help="Which methods; default: all but ablations.")
@click.option("--peer", "peers", multiple=True, help="Which peers.")
@click.option("--env-dir", type=click.Path(path_type=Path), help="Where environments of peers are made.")
@click.option("--peer-steps", type=int, help="Steps of peers that learn. [default: the peer's own]")
@click.option("--seeds", default="0,1,2", help="Seeds, separated by commas.")
@click.option("--split", type=click.Choice(["val", "test"]), default="test")
@click.option("--source", type=click.Choice(["subset", "full"]), default="subset")
@click.option("--steps", type=int, help="Steps of a stage. [default: the plugin's]")
@click.option("--work-dir", type=click.Path(path_type=Path), default=Path("work_dirs/compare"), help="Takes the rows.")
@click.option("--name", default="compare", help="Results go to results/<name>.json.")
def main(
    names: tuple[str, ...],
    presets: tuple[str, ...],
    methods: tuple[str, ...],
    peers: tuple[str, ...],
    env_dir: Path | None,
    peer_steps: int | None,
    seeds: str,
    split: str,
    source: str,
    steps: int | None,
    work_dir: Path,
    name: str,
) -> None:
    """Compare, and print one line per row."""
    logging.basicConfig(level=logging.WARNING)
    for model_name in names:
        model = load_classifier(model_name)
        images, labels = images_and_labels(split, source, model)
        batches = calibration_batches(model)
        for preset in presets:
            config = RepAPQConfig.from_preset(preset, **({} if steps is None else {"steps": steps}))
            about = {
                "model": model_name,
                "preset": preset,
                "split": split,
                "images": len(labels),
                "steps": config.steps,
            }
            folder = work_dir / f"{model_name}-{preset}-{split}-{source}-{config.steps}"

            def kept(progress: Progress, about: dict[str, Any] = about, folder: Path = folder) -> None:
                click.echo(f"{progress.done} of {progress.total}: {progress.part}")
                if (folder / TABLE_FILE).is_file():
                    keep(Comparison.load(folder), name, about)

            table = compare(
                TensorPath(model).eval(),
                batches,
                lambda network: {"top-1 %": top1(network, images, labels)},  # noqa: B023
                config,
                methods=methods,
                seeds=[int(seed) for seed in seeds.split(",")],
                folder=folder,
                latency=False,
                peers=PeerOptions(peers, env_dir, peer_steps),
                progress=kept,
            )
            for row in table.rows:
                scores = {**row.simulated, **{f"integer {key}": value for key, value in row.integer.items()}}
                click.echo(f"{model_name} {preset} {row.title}, seed {row.seed}: {scores or row.failed}")


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    main()
