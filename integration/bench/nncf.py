"""`nncf.quantize` by its defaults against ours: same model, data and placement; scores, kernels, operators, latency.

    python -m integration.bench.nncf --split test --seed 0

Both quantize the same merged float network (a deployed network is what a user of NNCF has) with the same 512
calibration images, one by one, as NNCF wants them. Below 8 bits NNCF offers nothing for CPUs; there its own 8-bit
result is given the same bits in the same places, over the ranges that NNCF found, and is carried in 8 bits like ours.
The classifiers are scored on all 10,000 test images, networks of scenes on their test scenes by their toolbox's metric:
in torch, and converted by ``openvino.convert_model`` in OpenVINO, float parts in 32 bits. Latency is paired: both
networks of a bit width take turns on one image. ``--split val`` is for choosing. Results go to ``results/nncf.json``
after every row; a row that is there already, with its files in ``--folder``, is not repeated.
"""

from __future__ import annotations

import copy
import json
import logging
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import nncf
import openvino
import torch
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph
from torch import Tensor, nn

from integration.bench.reference import (
    RESULTS,
    ROOT,
    calibration_batches,
    environment,
    images_and_labels,
    load_classifier,
    write_result,
)
from repapq_plugin import RepAPQConfig
from repapq_plugin.evaluation.latency import measure_latency
from repapq_plugin.evaluation.runtimes import OpenVINONetwork
from repapq_plugin.export.openvino import layer_kernels
from repapq_plugin.hosts.nncf import quantize_with_record
from repapq_plugin.hosts.nncf.few_bits import carry_few_bits, set_bits
from repapq_plugin.hosts.nncf.placement import find_placement
from repapq_plugin.hosts.openmmlab import TensorPath
from repapq_plugin.hosts.openmmlab.network import preprocess
from repapq_plugin.hosts.openmmlab.workbench import Workbench, open_config
from repapq_plugin.job import merge_for_inference
from repapq_plugin.quantizers.trace import trace_network

SCENES = {"yolov6-n": "coco/bbox_mAP", "rtmdet-ins": "coco/bbox_mAP", "repvgg-fcn": "mIoU"}
"""Networks of scenes, and which of their toolbox's metrics counts."""

CLASSIFIERS = ("repvgg", "mobileone")
THREADS = 1


@dataclass(frozen=True)
class Task:
    """A network to quantize, and how it is scored.

    Args:
        network: The float network, branches and all: images to tensors.
        images: Calibration images, one by one.
        score: Takes what computes the network's outputs; accuracy or mIoU in percent, or mAP.
    """

    network: nn.Module
    images: Sequence[Tensor]
    score: Callable[[nn.Module], float]


def classifier(name: str, split: str) -> Task:
    """Return a reference classifier, scored by its accuracy in percent."""
    model = load_classifier(name)
    images, labels = images_and_labels(split, "full", model)

    @torch.no_grad()
    def score(network: nn.Module) -> float:
        right = 0
        for batch, truth in zip(images.split(250), labels.split(250), strict=True):
            outputs = network(batch)
            logits = outputs if isinstance(outputs, Tensor) else outputs[0]
            right += int((logits.argmax(1) == truth).sum())
        return 100 * right / len(labels)

    calibration = [image[None] for batch in calibration_batches(model) for image in batch]
    return Task(TensorPath(model).eval(), calibration, score)


def scene_network(name: str, split: str, folder: str) -> Task:
    """Return the network part of a reference detector or segmentor, scored by its toolbox's metric."""
    cfg = open_config(ROOT / "mm_configs" / "fashion" / f"repapq_{name}_w8a8_fashion.py")
    if split == "val":
        cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator
    bench = Workbench(cfg, None, folder)
    with torch.no_grad():
        prepared = [preprocess(bench.model, batch)["inputs"] for batch in bench.batches]
    return Task(
        # A copy, because scoring puts another network into the model's place.
        TensorPath(copy.deepcopy(bench.model)).eval(),
        [image[None].clone() for images in prepared for image in images],
        lambda network: float(bench.score(bench.model, network)[SCENES[name]]),
    )


def merged_network(task: Task) -> nn.Module:
    """Return the float network as it is deployed."""
    with torch.no_grad():
        network, *_ = merge_for_inference(task.network, lambda model: model(task.images[0]))
    return network


def nncf_defaults(task: Task, merged: nn.Module) -> nn.Module:
    """Quantize the deployed network by `nncf.quantize` and nothing else."""
    return nncf.quantize(merged, nncf.Dataset(list(task.images)), subset_size=len(task.images))


def with_fewer_bits(model: nn.Module, merged: nn.Module, example: Tensor, config: RepAPQConfig) -> nn.Module:
    """Give NNCF's 8-bit result the bits of ``config`` over the ranges it has."""
    model = copy.deepcopy(model)
    placement = find_placement(model, build_nncf_graph(model, example), lambda: model(example))
    set_bits(placement, trace_network(merged, lambda: merged(example)), config)
    carry_few_bits(model, placement)
    return model


class Converted(OpenVINONetwork):
    """A quantized torch network, converted and compiled by OpenVINO, and what it consists of."""

    def __init__(self, network: nn.Module, example: Tensor, path: Path, precision: str | None = "f32") -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's, about NNCF's own code
            converted = openvino.convert_model(network, example_input=example)
        openvino.save_model(converted, path, compress_to_fp16=False)
        super().__init__(path, precision=precision)
        kernels = Counter(kernel.rpartition("_")[2] for kernel in layer_kernels(self.compiled).values())
        # Constants and converts of the stored weights are folded when a model is compiled.
        kinds = Counter(op.get_type_name() for op in openvino.Core().read_model(path).get_ops())
        self.structure = {
            "int8_layers": kernels["I8"],
            "layers": sum(kernels.values()),
            "operators": sum(count for kind, count in kinds.items() if kind not in ("Constant", "Result", "Parameter")),
            "fake_quantize": kinds["FakeQuantize"],
            "clamp": kinds["Clamp"],
        }


def paired_latency(paths: Mapping[str, Path], shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Time both networks of a bit width on one image in turn, fixed shape, OpenVINO's own precision."""
    networks = {
        name: OpenVINONetwork(path, threads=THREADS, precision=None, input_shapes=[shape])
        for name, path in paths.items()
    }
    image = [torch.rand(shape).numpy()]
    report = measure_latency(
        {name: partial(network.run_arrays, image) for name, network in networks.items()}, rounds=rounds, repeats=5
    )
    return {
        "median_ms": dict(report.median_ms),
        "ours_by_nncf": report.ratios["RepAPQ", "NNCF"],
        "rounds": rounds,
        "threads": THREADS,
    }


Key = tuple[str, str, str, int, str]
KEYS = ("model", "method", "preset", "seed", "split")
METHODS = ("NNCF", "RepAPQ")


@click.command()
@click.option("--model", "names", multiple=True, default=(*CLASSIFIERS, *SCENES), help="Which networks.")
@click.option("--preset", "presets", multiple=True, default=("w8a8", "w6a6", "w4a4"), help="Which bits.")
@click.option("--seed", default=0, show_default=True)
@click.option("--split", type=click.Choice(["val", "test"]), default="val")
@click.option("--rounds", default=100, show_default=True, help="Rounds of the paired latency; 0 leaves it out.")
@click.option("--name", default="nncf", help="Results go to results/<name>.json.")
@click.option("--folder", default="work_dirs/bench_nncf", help="Where the converted networks are kept.")
@click.option("--set", "overrides", multiple=True, help="key=json, overrides a key of every RepAPQ run.")
def main(
    names: tuple[str, ...],
    presets: tuple[str, ...],
    seed: int,
    split: str,
    rounds: int,
    name: str,
    folder: str,
    overrides: tuple[str, ...],
) -> None:
    """Quantize every network both ways at every bit width, and print one line each."""
    logging.basicConfig(level=logging.WARNING)
    nncf.set_log_level(logging.ERROR)
    extra = {key: json.loads(value) for key, _, value in (item.partition("=") for item in overrides)}
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    kept_at = Path(folder)
    kept_at.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        write_result(name, {"environment": environment(), "rows": rows})

    for model_name in names:
        done = {tuple(row[key] for key in KEYS) for row in rows}
        keys = [(model_name, method, preset, seed, split) for preset in presets for method in METHODS]
        wanted = [key for key in keys if key not in done]
        if wanted:
            with tempfile.TemporaryDirectory() as work:
                task = (
                    classifier(model_name, split)
                    if model_name in CLASSIFIERS
                    else scene_network(model_name, split, work)
                )
                for row in measured(task, wanted, extra, kept_at):
                    rows.append(row)
                    click.echo(_line(row))
                    save()
        for preset in presets if rounds else ():
            row = next(
                row for row in rows if tuple(row[k] for k in KEYS) == (model_name, "RepAPQ", preset, seed, split)
            )
            files = {method: kept_at / file_name((model_name, method, preset, seed, split)) for method in METHODS}
            if "latency" not in row and all(file.is_file() for file in files.values()):
                row["latency"] = paired_latency(files, tuple(row["input"]), rounds)
                click.echo(f"{model_name} {preset} latency: {row['latency']}")
                save()


def file_name(key: Key) -> str:
    """Return the name of the converted network of a row."""
    return "-".join(map(str, key)) + ".xml"


def measured(task: Task, keys: Sequence[Key], extra: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """Quantize a network as each of ``keys`` says, and yield a row for each.

    Args:
        task: The network.
        keys: Model, method, preset, seed, split.
        extra: Overrides of our configuration.
        folder: Where converted networks are written.
    """
    example, float_score = task.images[0], task.score(task.network)
    merged = merged_network(task)
    by_nncf, nncf_seconds = None, 0.0
    for key in keys:
        _, method, preset, seed, _ = key
        config = RepAPQConfig.from_preset(preset, **extra, seed=seed)
        started = time.perf_counter()
        kept = None
        if method == "NNCF":
            if by_nncf is None:
                by_nncf = nncf_defaults(task, merged)
                nncf_seconds = time.perf_counter() - started
            quantized = with_fewer_bits(by_nncf, merged, example, config) if preset != "w8a8" else by_nncf
            seconds = nncf_seconds
        else:
            dataset = nncf.Dataset(list(task.images))
            result = quantize_with_record(task.network, dataset, subset_size=len(task.images), repapq=config)
            quantized, seconds = result.model, time.perf_counter() - started
            kept = [sum(unit.kept for unit in result.units), len(result.units)]
        converted = Converted(quantized, example, folder / file_name(key))
        yield dict(zip(KEYS, key, strict=True)) | {
            "input": list(example.shape),
            "float": float_score,
            "torch": task.score(quantized),
            "openvino": task.score(converted),
            **converted.structure,
            "seconds": round(seconds, 1),
            "units_kept": kept,
            "config": config.to_dict() if method == "RepAPQ" else None,
        }


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['model']} {row['preset']} {row['method']:7s} float {row['float']:.3f} torch {row['torch']:.3f} openvino "
        f"{row['openvino']:.3f}, {row['int8_layers']} of {row['layers']} layers in integers, {row['operators']} "
        f"operators ({row['clamp']} clamps), {row['seconds']} s, units kept {row['units_kept']}"
    )


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    main()
