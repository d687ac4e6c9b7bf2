"""How fast INT8 is: RepVGG-A0 at 224 in OpenVINO, float, by this package and by NNCF, side by side.

    python -m integration.bench.latency --rounds 60

The weights are random (time does not depend on them), the statistics of the norms are those of a few
training passes. All three networks run in one process with the same settings and take turns, so that
a busy machine slows all of them. The result goes to ``results/latency.json``.
"""

from __future__ import annotations

import importlib.metadata
import logging
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from integration.bench.reference import environment, write_result
from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.evaluation.latency import measure_latency
from repapq_plugin.evaluation.runtimes import OpenVINONetwork
from repapq_plugin.export import check_int8, export_onnx, export_openvino
from repapq_plugin.export.openvino import layer_kernels
from repapq_plugin.job import merge_for_inference


def make_network(name: str, size: int) -> tuple[nn.Module, list[Tensor]]:
    """Return a branched timm network with sane norm statistics, and batches like those that made them."""
    import timm

    network = timm.create_model(name, pretrained=False).train()
    batches = [torch.randn(8, 3, size, size) for _ in range(4)]
    with torch.no_grad():
        for batch in batches:
            network(batch)
    return network.eval(), batches


def quantize_with_nncf(float_xml: Path, batches: list[Tensor], path: Path) -> None:
    """Quantize the float IR with NNCF's defaults and write the result."""
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    images = [image[None].numpy() for batch in batches for image in batch]
    model = openvino.Core().read_model(float_xml)
    openvino.save_model(nncf.quantize(model, nncf.Dataset(images)), path, compress_to_fp16=False)


def runner(path: Path, image: Tensor, threads: int) -> tuple[OpenVINONetwork, Callable[[], Any]]:
    """Return a compiled network for one image and what runs it once, without a copy on either side."""
    network = OpenVINONetwork(path, threads=threads, precision=None, input_shapes=[tuple(image.shape)])
    request, array = network.request, image.numpy()
    return network, lambda: request.infer([array], share_inputs=True, share_outputs=True)


def summarise(network: OpenVINONetwork) -> dict[str, int]:
    """Count the kernels of convolutions and matrix products."""
    return dict(Counter(layer_kernels(network.compiled).values()).most_common())


@click.command()
@click.option("--model", default="repvgg_a0", show_default=True, help="Name of a timm network.")
@click.option("--size", default=224, show_default=True, help="Height and width of the input.")
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=60, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(model: str, size: int, threads: int, rounds: int, seed: int) -> None:
    """Measure and write ``results/latency.json``."""
    torch.manual_seed(seed)
    network, batches = make_network(model, size)
    image = batches[0][:1]
    config = RepAPQConfig.from_preset("w8a8", steps=0, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.xml" for name in ("float", "repapq", "nncf")}
        merged, *_ = merge_for_inference(network, lambda m: m(image))
        float_onnx = export_onnx(merged, image, Path(folder) / "float.onnx")
        export_openvino(float_onnx.path, image, paths["float"])
        result = quantize_model(network, batches, config)
        written = export_openvino(result, image, paths["repapq"])
        quantize_with_nncf(paths["float"], batches, paths["nncf"])
        candidates = {name: runner(path, image, threads) for name, path in paths.items()}
        check_int8(candidates["repapq"][0].compiled, written.integer_layers or 0)
        report = measure_latency({name: run for name, (_, run) in candidates.items()}, rounds=rounds)
        kernels = {name: summarise(compiled) for name, (compiled, _) in candidates.items()}
        sizes = {name: path.with_suffix(".bin").stat().st_size for name, path in paths.items()}
    environment_now = environment()
    environment_now["versions"]["timm"] = importlib.metadata.version("timm")
    content = {
        "model": model,
        "input": [1, 3, size, size],
        "scheme": "W8A8, weights per channel, activations per tensor, first and last layer too",
        "runtime": {"threads": threads, "hint": "LATENCY", "precision": "OpenVINO's default"},
        "seed": seed,
        "rounds": report.rounds,
        "median_ms": dict(report.median_ms),
        "min_ms": dict(report.min_ms),
        "max_ms": dict(report.max_ms),
        "float_by_repapq": report.ratios["float", "repapq"],
        "float_by_nncf": report.ratios["float", "nncf"],
        "nncf_by_repapq": report.ratios["nncf", "repapq"],
        "weight_bytes": sizes,
        "kernels": kernels,
        "environment": environment_now,
    }
    path = write_result("latency", content)
    for name in paths:
        click.echo(
            f"{name:8} median {report.median_ms[name]:7.2f} ms, min {report.min_ms[name]:7.2f}, "
            f"max {report.max_ms[name]:7.2f}; {sizes[name] / 1e6:.1f} MB; {kernels[name]}"
        )
    click.echo(
        f"repapq is {content['float_by_repapq']:.2f} times as fast as float, "
        f"{content['nncf_by_repapq']:.3f} times as fast as NNCF's INT8"
    )
    click.echo(f"{environment_now}\nwrote {path.name}")


if __name__ == "__main__":
    main()
