"""How fast INT8 is: ours, float and other tools' INT8, side by side in OpenVINO, onnxruntime, inductor and XNNPACK.

    python -m integration.bench.latency --quick               # OpenVINO and onnxruntime, about two minutes
    python -m integration.bench.latency                       # inductor too, about five minutes
    python -m integration.bench.latency --write-programs DIR  # for XNNPACK, which wants other packages:
    python -m integration.bench.latency --programs DIR        # where executorch is installed
    python -m integration.bench.latency --network repvgg_a0 --runtime openvino --rounds 20

Weights are random (time does not depend on them), statistics of norms are those of a few training passes. All
candidates of a network and a runtime stand in one process and take turns, so that a busy machine slows all of them;
ratios are medians over rounds. Each candidate says which precision it ran in: OpenVINO computes float networks, and
what is float beside integers, in bf16 on processors with AMX unless it is told otherwise. The result goes to
``results/latency.json`` after each runtime.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from integration.bench.latency_candidates import RUNTIMES, Candidate, Prepared
from integration.bench.latency_xnnpack import on_xnnpack, write_programs
from integration.bench.reference import RESULTS, ROOT, environment, write_result
from repapq_plugin.evaluation.latency import measure_latency
from repapq_plugin.job import merge_for_inference

NETWORKS = {"repvgg_a0": 224, "yolov6_n": 640}
"""Height and width of the input, in pixels, by network."""

DETECTOR = ROOT / "mm_configs" / "mmyolo" / "repapq_yolov6-n_w8a8_coco.py"
IMAGES = 4
"""How many images ranges are found on."""

ALLOWED = 1.03
"""How many times the other tool's time ours may take."""


def make_network(name: str, size: int) -> tuple[nn.Module, list[Tensor]]:
    """Return a branched timm network with sane norm statistics, and batches like those that made them."""
    import timm

    network = timm.create_model(name, pretrained=False).train()
    return settled(network, size)


def make_detector(size: int) -> tuple[nn.Module, list[Tensor]]:
    """Return the network part of mmyolo's YOLOv6-n in the same way."""
    from mmengine.registry import MODELS, init_default_scope

    from repapq_plugin.hosts.openmmlab.network import TensorPath
    from repapq_plugin.hosts.openmmlab.workbench import open_config

    cfg = open_config(DETECTOR)
    init_default_scope("mmyolo")
    network, batches = settled(TensorPath(MODELS.build(cfg.model)).train(), size)
    return network, batches


def settled(network: nn.Module, size: int) -> tuple[nn.Module, list[Tensor]]:
    """Let norms of a network in training see some noise; return it in evaluation mode, and the noise."""
    batches = [torch.randn(IMAGES // 2, 3, size, size) for _ in range(2)]
    with torch.no_grad():
        for batch in batches:
            network(batch)
    return network.eval(), batches


def prepared(name: str, folder: Path, seed: int, size: int) -> Prepared:
    """Make a network and merge it; candidates make their files of it."""
    torch.manual_seed(seed)
    network, batches = make_detector(size) if name == "yolov6_n" else make_network(name, size)
    image = batches[0][:1].clone()
    merged = merge_for_inference(network, lambda m: m(image)).network
    return Prepared(folder, merged.eval(), batches, seed)


def timed(candidates: Mapping[str, Candidate], rounds: int) -> dict[str, Any]:
    """Let candidates take turns; return times, ratios and what each of them ran in."""
    with torch.no_grad():
        report = measure_latency({name: candidate.run for name, candidate in candidates.items()}, rounds=rounds)
    ours = [name for name in candidates if name.startswith("RepAPQ") and candidates[name].against in candidates]
    others = [name for name, candidate in candidates.items() if candidate.rival]
    floats = [name for name in candidates if name.startswith("float")]
    slower = {f"{our} by {candidates[our].against}": report.ratios[our, candidates[our].against] for our in ours}
    return {
        "rounds": report.rounds,
        "median_ms": dict(report.median_ms),
        "min_ms": dict(report.min_ms),
        "max_ms": dict(report.max_ms),
        "precision": {name: candidate.precision for name, candidate in candidates.items()},
        "kernels": {name: dict(candidate.kernels) for name, candidate in candidates.items()},
        "times_as_fast_as_float": {
            f"{name} over {slow}": report.ratios[slow, name] for name in (*ours, *others) for slow in floats
        },
        "ours_by_theirs": slower,
        "within_3_percent": all(ratio <= ALLOWED for ratio in slower.values()),
    }


def show(network: str, runtime: str, row: Mapping[str, Any]) -> None:
    """Print one row."""
    click.echo(f"{network} on {runtime}, {row['rounds']} paired rounds")
    for name, median in row["median_ms"].items():
        fastest = row["min_ms"][name]
        click.echo(f"  {name:28} {median:8.2f} ms (fastest {fastest:.2f}), {row['precision'][name]}")
    for group in ("times_as_fast_as_float", "ours_by_theirs"):
        for name, ratio in row[group].items():
            click.echo(f"  {group}: {name} {ratio:.3f}")


@click.command()
@click.option("--network", "networks", multiple=True, type=click.Choice(list(NETWORKS)), help="Default: all.")
@click.option("--runtime", "runtimes", multiple=True, type=click.Choice(list(RUNTIMES)), help="Default: all.")
@click.option("--quick", is_flag=True, help="OpenVINO and onnxruntime, 30 rounds.")
@click.option(
    "--write-programs",
    "write_programs_to",
    type=click.Path(path_type=Path),
    help="Write what --programs reads, and time nothing.",
)
@click.option("--programs", type=click.Path(path_type=Path, exists=True), help="Race on XNNPACK, from this folder.")
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", type=int, help="Paired rounds. [default: 60, or 30 if quick]")
@click.option("--seed", default=0, show_default=True)
@click.option("--size", type=int, help="Height and width of the input, for a try. Default: that of the network.")
@click.option("--dry", is_flag=True, help="Print only; write no result.")
def main(
    networks: tuple[str, ...],
    runtimes: tuple[str, ...],
    quick: bool,
    write_programs_to: Path | None,
    programs: Path | None,
    threads: int,
    rounds: int | None,
    seed: int,
    size: int | None,
    dry: bool,
) -> None:
    """Measure and write ``results/latency.json``."""
    torch.set_num_threads(threads)
    started = time.perf_counter()
    rounds = rounds or (30 if quick else 60)
    if quick:
        runtimes = runtimes or ("openvino", "onnxruntime")
    for name in networks or NETWORKS:
        pixels = size or NETWORKS[name]
        with tempfile.TemporaryDirectory() as folder:
            if programs is not None:
                keep(name, "xnnpack", timed(on_xnnpack(programs / name), rounds), pixels, seed, None, dry)
                continue
            made = prepared(name, Path(folder), seed, pixels)
            if write_programs_to is not None:
                write_programs(made, write_programs_to / name)
                continue
            for runtime in runtimes or RUNTIMES:
                keep(name, runtime, timed(RUNTIMES[runtime](made, threads), rounds), pixels, seed, threads, dry)
    click.echo(f"{time.perf_counter() - started:.0f} seconds")


def keep(
    network: str, runtime: str, row: dict[str, Any], pixels: int, seed: int, threads: int | None, dry: bool
) -> None:
    """Print a row, and write it to ``results/latency.json`` unless ``dry``."""
    where = environment("timm", "onnx", "torchao", "executorch")
    row |= {
        "size": pixels,
        "threads": threads,
        "seed": seed,
        "command": f"python -m integration.bench.latency {' '.join(sys.argv[1:])}".strip(),
        "environment": where,
    }
    show(network, runtime, row)
    path = RESULTS / "latency.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"rows": {}}
    content["rows"].setdefault(network, {})[runtime] = row
    if not dry:
        write_result("latency", content)


if __name__ == "__main__":
    main()
