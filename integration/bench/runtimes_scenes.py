"""The detector and the segmentor on runtimes for phones against their simulation, on all test scenes.

    python -m integration.bench.runtimes_scenes prepare FOLDER
    python -m integration.bench.runtimes_scenes run FOLDER executorch    # where executorch is installed
    python -m integration.bench.runtimes_scenes run FOLDER litert        # where litert-torch is installed
    python -m integration.bench.runtimes_scenes score FOLDER

The first command quantizes, with ranges alone, and writes programs, images and simulated outputs. The second runs a
runtime on all images; it needs no toolbox. The last one hands what came out to the toolbox's own metric, and writes
``results/runtimes_scenes.json``.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from integration.bench.reference import RESULTS, environment, write_result
from repapq_plugin.core.tensors import tensors_of

SCENES = ("yolov6-n", "repvgg-fcn")
CALIBRATION = 64
"""Images on which ranges of unrounded outputs are found."""


class OneByOne(nn.Module):
    """Runs a network image by image, and keeps what went in and came out.

    Args:
        network: Takes one image, float ``(1, C, H, W)``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.images: list[Tensor] = []
        self.outputs: list[list[Tensor]] = []

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs, each ``(N, ...)``."""
        found = [[y.clone() for y in tensors_of(self.network(image))] for image in images.split(1)]
        self.images += images.split(1)
        self.outputs += found
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def stacked(self) -> dict[str, Tensor]:
        """Return all outputs by number, in the order of the images."""
        return {str(i): torch.cat(parts) for i, parts in enumerate(zip(*self.outputs, strict=True))}


class Replay(nn.Module):
    """Gives the outputs that a runtime gave, in the same order of images."""

    def __init__(self, outputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.outputs = [outputs[str(i)] for i in range(len(outputs))]
        self.done = 0

    def forward(self, images: Tensor) -> tuple[Tensor, ...] | Tensor:
        """Return the next outputs."""
        begin, self.done = self.done, self.done + len(images)
        found = tuple(part[begin : self.done] for part in self.outputs)
        return found if len(found) > 1 else found[0]


@click.group()
def main() -> None:
    """Compare runtimes with their simulation on scenes."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--preset", default="w8a8", show_default=True)
def prepare(folder: Path, preset: str) -> None:
    """Quantize both networks, and write programs, images and simulated outputs into FOLDER."""
    from integration.bench.scenes import METRICS, open_bench
    from repapq_plugin import RepAPQConfig
    from repapq_plugin.export.program import quantized_program
    from repapq_plugin.hosts.openmmlab.network import TensorPath, preprocess

    folder.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        for name in SCENES:
            bench = open_bench(name, "test", None, Path(work))
            result = bench.calibrate(RepAPQConfig.from_preset(preset, target="executorch").plain())
            with torch.no_grad():
                images = [preprocess(bench.model, batch)["inputs"] for batch in bench.batches]
                given = torch.cat(images)[:CALIBRATION].split(1)
                program = quantized_program(TensorPath(result.model).eval(), bench.example, batches=given)
                program.save(folder / f"{name}.pt2")
                simulation = OneByOne(program.graph)
                scores = bench.score(result.model, simulation)
            save_file({"images": torch.cat(simulation.images)}, folder / f"{name}.images.safetensors")
            save_file(simulation.stacked(), folder / f"{name}.simulated.safetensors")
            calibrated = bench.score(result.model)
            told[name] = {
                "preset": preset,
                "scenes": len(simulation.images),
                "metrics": list(METRICS[name]),
                "calibrated": {metric: float(calibrated[metric]) for metric in METRICS[name]},
                "simulated": {metric: float(scores[metric]) for metric in METRICS[name]},
            }
            click.echo(f"{name}: {told[name]}")
            (folder / "told.json").write_text(json.dumps(told))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.argument("runtimes", nargs=-1, type=click.Choice(["executorch", "litert"]), required=True)
def run(folder: Path, runtimes: Sequence[str]) -> None:
    """Run RUNTIMES on what FOLDER holds, and write what came out there."""
    from integration.bench.runtimes import run_executorch, run_litert

    opens = {"executorch": run_executorch, "litert": run_litert}
    for name in json.loads((folder / "told.json").read_text()):
        images = load_file(folder / f"{name}.images.safetensors")["images"]
        wanted = load_file(folder / f"{name}.simulated.safetensors")
        for runtime in runtimes:
            network, integer, layers = opens[runtime](folder / name, folder, "")
            found = OneByOne(network)
            for image in images.split(1):
                found(image)
            outputs = found.stacked()
            save_file(outputs, folder / f"{name}.{runtime}.safetensors")
            same = sum(int((outputs[key] == wanted[key]).sum()) for key in wanted)
            worst = max(
                float((outputs[key].double() - wanted[key].double()).abs().max() / wanted[key].abs().max())
                for key in wanted
            )
            said = {
                "integer": integer,
                "layers": layers,
                "equal": 100 * same / sum(part.numel() for part in wanted.values()),
                "max_rel_difference": worst,
                "environment": environment("executorch", "litert-torch", "ai-edge-litert"),
            }
            (folder / f"{name}.{runtime}.json").write_text(json.dumps(said))
            click.echo(f"{name} on {runtime}: {said}")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
def score(folder: Path) -> None:
    """Score what came out by the toolboxes' own metrics, and keep the figures."""
    from integration.bench.scenes import open_bench

    path = RESULTS / "runtimes_scenes.json"
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = {(row["model"], row["preset"], row["runtime"]): row for row in kept}
    with tempfile.TemporaryDirectory() as work:
        for name, told in json.loads((folder / "told.json").read_text()).items():
            bench = open_bench(name, "test", None, Path(work))
            for file in sorted(folder.glob(f"{name}.*.json")):
                runtime = file.name.split(".")[-2]
                scores = bench.score(bench.model, Replay(load_file(file.with_suffix(".safetensors"))))
                found = {metric: float(scores[metric]) for metric in told["metrics"]}
                row = {"model": name, "runtime": runtime, **told, "scores": found, **json.loads(file.read_text())}
                rows[name, told["preset"], runtime] = row
                click.echo(f"{name} on {runtime}: {found}, simulated {told['simulated']}")
    write_result("runtimes_scenes", {"rows": list(rows.values())})


if __name__ == "__main__":
    main()
