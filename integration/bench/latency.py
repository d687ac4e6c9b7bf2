"""How fast INT8 is: ours, float and other tools' INT8, side by side in OpenVINO, onnxruntime and torch's inductor.

    python -m integration.bench.latency                       # everything, about five minutes
    python -m integration.bench.latency --network repvgg_a0 --runtime openvino --rounds 20

Weights are random (time does not depend on them), statistics of norms are those of a few training passes. All
candidates of a network and a runtime stand in one process and take turns, so that a busy machine slows all of them;
ratios are medians over rounds. Each candidate says which precision it ran in: OpenVINO computes float networks, and
what is float beside integers, in bf16 on processors with AMX unless it is told otherwise. The result goes to
``results/latency.json`` after each runtime.
"""

from __future__ import annotations

import importlib.metadata
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
from integration.bench.reference import RESULTS, ROOT, environment, write_result
from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.evaluation.latency import measure_latency
from repapq_plugin.export import export_onnx, export_openvino
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
    """Make a network, merge it, quantize it for two targets, and write all files that candidates are made of."""
    torch.manual_seed(seed)
    network, batches = make_detector(size) if name == "yolov6_n" else make_network(name, size)
    image = batches[0][:1].clone()
    merged = merge_for_inference(network, lambda m: m(image)).network
    export_onnx(merged, image, folder / "float.onnx", dynamic_batch=False)
    export_openvino(folder / "float.onnx", image, folder / "float.xml")
    results = {}
    for target in ("generic", "onnxruntime"):
        # Ranges by min and max, and nothing learned: time does not depend on either.
        config = RepAPQConfig.from_preset("w8a8", seed=seed, target=target).plain()
        results[target] = quantize_model(merged, batches, config)
        export_onnx(results[target], image, folder / f"{target}.onnx", dynamic_batch=False)
    export_openvino(folder / "generic.onnx", image, folder / "generic.xml")
    images = [one[None] for batch in batches for one in batch]
    return Prepared(folder, merged.eval(), results["generic"], image, images)


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
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=60, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--size", type=int, help="Height and width of the input, for a try. Default: that of the network.")
@click.option("--dry", is_flag=True, help="Print only; write no result.")
def main(
    networks: tuple[str, ...],
    runtimes: tuple[str, ...],
    threads: int,
    rounds: int,
    seed: int,
    size: int | None,
    dry: bool,
) -> None:
    """Measure and write ``results/latency.json``."""
    torch.set_num_threads(threads)
    started = time.perf_counter()
    where = environment()
    for package in ("timm", "onnx", "torchao"):
        where["versions"][package] = importlib.metadata.version(package)
    path = RESULTS / "latency.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if "rows" not in content:
        content = {"rows": {}}
    for name in networks or NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            made = prepared(name, Path(folder), seed, size or NETWORKS[name])
            for runtime in runtimes or RUNTIMES:
                row = timed(RUNTIMES[runtime](made, threads), rounds)
                row |= {
                    "input": list(made.image.shape),
                    "scheme": made.result.config.scheme,
                    "threads": threads,
                    "seed": seed,
                    "command": f"python -m integration.bench.latency {' '.join(sys.argv[1:])}".strip(),
                    "environment": where,
                }
                show(name, runtime, row)
                content["rows"].setdefault(name, {})[runtime] = row
                if not dry:
                    write_result("latency", content)
    click.echo(f"{where}\n{time.perf_counter() - started:.0f} seconds")


if __name__ == "__main__":
    main()
