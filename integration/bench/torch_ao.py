"""What the reference networks score as torch.ao's integer modules and as pt2e graphs, and how fast pt2e runs compiled.

    python -m integration.bench.torch_ao classifiers --split test
    python -m integration.bench.torch_ao detector --split test
    python -m integration.bench.torch_ao latency

Each calibrated network is scored five times on the same images: as calibrated, as the graph that torch.ao
prepared from it, as the one that follows its engine to the last bit, as torch.ao's integer modules, and as
pt2e's converted graph. ``latency`` times RepVGG-A0 with random weights, float and converted, both compiled by
inductor, in turns. Results go to ``results/torch_ao.json`` after every run.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from integration.bench.latency import make_network
from integration.bench.reference import (
    RESULTS,
    ROOT,
    calibration_batches,
    environment,
    forward,
    images_and_labels,
    load_classifier,
    write_result,
)
from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.core.tensors import tensors_of
from repapq_plugin.evaluation.latency import measure_latency
from repapq_plugin.hosts import pt2e, torch_ao
from repapq_plugin.hosts.openmmlab.network import TensorPath, preprocess
from repapq_plugin.hosts.openmmlab.workbench import Workbench, open_config
from repapq_plugin.job import merge_for_inference

DETECTOR = ROOT / "mm_configs" / "fashion" / "repapq_yolov6-n_w8a8_fashion.py"
COMPARED = (
    ("torch.ao int8", "torch.ao simulated"),
    ("torch.ao int8", "torch.ao prepared"),
    ("pt2e converted", "calibrated"),
)
"""Integer forms, and what simulates them."""

RANGE_BATCHES = 8
"""Calibration batches that give torch.ao's extra output quantizers their range."""


def keep(part: str, key: str, row: dict[str, object]) -> None:
    """Write one row into ``results/torch_ao.json``."""
    path = RESULTS / "torch_ao.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    content["environment"] = environment()
    content.setdefault(part, {})[key] = row
    write_result("torch_ao", content)


def forms(model: nn.Module, images: list[Tensor], engine: str) -> dict[str, nn.Module]:
    """Return a calibrated network and what the two hosts make of it.

    Args:
        model: Calibrated; takes one tensor of images.
        images: Batches for the ranges of torch.ao's outputs.
        engine: Of torch.ao's integer modules.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    example = (images[0],)
    prepared = torch_ao.prepare_learned(model, example, images, backend=engine)
    batch = torch.export.Dim("batch", min=1, max=4096)
    learned = pt2e.prepare_learned(model, example, dynamic_shapes=({0: batch},))
    return {
        "calibrated": model,
        "torch.ao prepared": prepared,
        "torch.ao simulated": torch_ao.simulate_integers(prepared, engine),
        "torch.ao int8": torch_ao.convert_to_int8(prepared, engine),
        "pt2e converted": convert_pt2e(learned),
    }


@torch.no_grad()
def run(network: nn.Module, images: Tensor, engine: str, size: int = 100) -> Tensor:
    """Return all outputs of a network as one tensor, ``(N, values)``."""
    with torch_ao.integer_engine(engine):
        outputs = [torch.cat([y.flatten(1) for y in tensors_of(network(batch))], dim=1) for batch in images.split(size)]
    return torch.cat(outputs)


def engine_for(reduce_range: bool) -> str:
    """Return the engine of torch.ao that computes such weights exactly on this processor."""
    return torch_ao.exact_engine([(7 if reduce_range else 8, 8)])


def differences(outputs: dict[str, Tensor]) -> dict[str, object]:
    """Compare each integer form with what simulates it."""
    row: dict[str, object] = {}
    for one, other in COMPARED:
        gap = (outputs[one] - outputs[other]).abs()
        row[f"{one} against {other}"] = {
            "max": float(gap.max()),
            "max_by_largest_output": float(gap.max() / outputs[other].abs().max()),
            "images_that_differ": int(gap.any(1).sum()),
            "images": len(gap),
        }
    return row


@click.group()
def main() -> None:
    """Measure what the hosts torch.ao and torchao make of calibrated networks."""
    logging.basicConfig(level=logging.WARNING)
    warnings.simplefilter("ignore")


@main.command()
@click.option("--model", "names", multiple=True, default=("repvgg", "mobileone"))
@click.option("--preset", "presets", multiple=True, default=("w8a8", "w4a4"))
@click.option("--split", type=click.Choice(["val", "test"]), default="val")
@click.option("--images", "count", type=int, help="Only the first so many images of the split.")
@click.option("--steps", type=int, help="Steps of the calibration; default: the configuration's.")
@click.option("--seed", default=0)
@click.option("--reduce-range", is_flag=True, help="7 bits of each 8-bit weight, which every engine computes exactly.")
def classifiers(
    names: tuple[str, ...],
    presets: tuple[str, ...],
    split: str,
    count: int | None,
    steps: int | None,
    seed: int,
    reduce_range: bool,
) -> None:
    """Score both classifiers in all forms."""
    engine = engine_for(reduce_range)
    for name in names:
        model = load_classifier(name)
        images, labels = (part[:count] for part in images_and_labels(split, "full", model))
        batches = calibration_batches(model)
        for preset in presets:
            changes = {} if steps is None else {"steps": steps}
            config = RepAPQConfig.from_preset(preset, seed=seed, reduce_range=reduce_range, **changes)
            result = quantize_model(model, batches, config, forward_fn=forward)
            network = SingleOutput(result.model)
            row: dict[str, object] = {"split": split, "seed": seed, "engine": engine, "config": config.to_dict()}
            outputs = {
                form: run(each, images, engine)
                for form, each in forms(network, batches[:RANGE_BATCHES], engine).items()
            }
            row["accuracy"] = {
                form: 100 * float((y.argmax(1) == labels).double().mean()) for form, y in outputs.items()
            }
            row |= differences(outputs)
            key = f"{name} {preset}" + (", reduce_range" if reduce_range else "")
            keep("classifiers", key, row)
            click.echo(f"{key}: {json.dumps({k: row[k] for k in row if k != 'config'}, indent=1)}")


class SingleOutput(nn.Module):
    """A classifier's images-to-logits path as a module of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images, mode="tensor")
        return logits


@main.command()
@click.option("--preset", "presets", multiple=True, default=("w8a8", "w4a4"))
@click.option("--split", type=click.Choice(["val", "test"]), default="val")
@click.option("--steps", type=int, help="Steps of the calibration; default: the configuration's.")
@click.option("--seed", default=0)
@click.option("--reduce-range", is_flag=True, help="7 bits of each 8-bit weight, which every engine computes exactly.")
def detector(presets: tuple[str, ...], split: str, steps: int | None, seed: int, reduce_range: bool) -> None:
    """Score the YOLOv6-n in all forms by MMDetection's COCO metric."""
    engine = engine_for(reduce_range)
    cfg = open_config(DETECTOR)
    if split == "val":
        cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(cfg, None, Path(folder), seed=seed)
        for preset in presets:
            changes = {} if steps is None else {"steps": steps}
            config = RepAPQConfig.from_preset(preset, seed=seed, reduce_range=reduce_range, **changes)
            result = bench.calibrate(config)
            images = [preprocess(bench.model, batch)["inputs"] for batch in bench.batches[:RANGE_BATCHES]]
            networks = forms(TensorPath(result.model).eval(), images, engine)
            row: dict[str, object] = {"split": split, "seed": seed, "engine": engine, "config": config.to_dict()}
            scores: dict[str, float] = {}
            for form, network in networks.items():
                with torch_ao.integer_engine(engine):
                    served = None if form == "calibrated" else network
                    scores[form] = bench.score(result.model, served)["coco/bbox_mAP"]
            row["mAP"] = scores
            some = torch.cat(images)[:32]
            row |= differences({form: run(network, some, engine) for form, network in networks.items()})
            key = f"yolov6-n {preset}" + (", reduce_range" if reduce_range else "")
            keep("detector", key, row)
            click.echo(f"{key}: {json.dumps({k: row[k] for k in row if k != 'config'}, indent=1)}")


@main.command()
@click.option("--model", "name", default="repvgg_a0", show_default=True, help="Name of a timm network.")
@click.option("--size", default=224, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--rounds", default=40, show_default=True)
@click.option("--seed", default=0)
def latency(name: str, size: int, threads: int, rounds: int, seed: int) -> None:
    """Time the merged float network and pt2e's converted graph, both compiled, in turns."""
    from torch._inductor import config as inductor
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    torch.manual_seed(seed)
    network, batches = make_network(name, size)
    image = batches[0][:1]
    merged = merge_for_inference(network, lambda m: m(image)).network
    ranges = RepAPQConfig.from_preset("w8a8", first_last_bits=None, seed=seed).plain()
    result = quantize_model(network, batches, ranges)
    converted = convert_pt2e(pt2e.prepare_learned(result, (image,)))
    torch.set_num_threads(threads)
    inductor.freezing = True
    runs: dict[str, Callable[[], Tensor]] = {}
    seconds: dict[str, float] = {}
    with torch.no_grad():
        for kind, each in (("float", merged.eval()), ("int8", converted)):
            started = time.perf_counter()
            compiled = torch.compile(each)
            compiled(image)
            seconds[kind] = round(time.perf_counter() - started, 1)
            runs[kind] = lambda compiled=compiled: compiled(image)
        gap = float((runs["int8"]() - result.model(image)).abs().max() / result.model(image).abs().max())
        report = measure_latency(runs, rounds=rounds)
    row = {
        "input": list(image.shape),
        "threads": threads,
        "rounds": rounds,
        "seed": seed,
        "median_ms": dict(report.median_ms),
        "min_ms": dict(report.min_ms),
        "max_ms": dict(report.max_ms),
        "float_by_int8": report.ratios["float", "int8"],
        "compile_seconds": seconds,
        "difference_by_largest_output": gap,
        "saturates": torch_ao.saturates("onednn"),
    }
    keep("latency", name, row)
    click.echo(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
