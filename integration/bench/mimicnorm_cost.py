"""What a training step with MimicNorm needs, beside batch norm: memory and time, on a processor or a GPU.

    python -m integration.bench.mimicnorm_cost                             # a processor, images of 64 x 64
    python -m integration.bench.mimicnorm_cost --device cuda --size 224
    python -m integration.bench.mimicnorm_cost --device cuda --size 224 --autocast

torchvision's ResNet-18 in batches of 128. On a processor memory is what a forward pass keeps for the backward pass, by
image; on a GPU the highest use of a few steps above weights and images, so gradients and momenta count. Times are
medians of rounds in which both take turns. Results go to ``results/mimicnorm.json`` under ``cost``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click
import torch
import torchvision
from torch import Tensor, nn

from integration.bench.mimicnorm import keep
from integration.bench.mimicnorm_training import BATCH, make_optimizer
from repapq_plugin.evaluation.latency import measure_latency
from repapq_plugin.mimicnorm import LastBatchNorm, WeightMean, convert

MIB = 2**20


@click.command()
@click.option("--rounds", default=10, show_default=True)
@click.option("--size", default=64, show_default=True, help="Height and width of the images.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--autocast", is_flag=True, help="Compute in bfloat16 where torch does so by itself.")
@click.option("--threads", default=1, show_default=True)
def main(rounds: int, size: int, device: str, autocast: bool, threads: int) -> None:
    """Measure torchvision's ResNet-18 in batches of 128: memory of a training step, and its time."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    images, labels = torch.randn(BATCH, 3, size, size), torch.randint(0, 1000, (BATCH,))
    normed = torchvision.models.resnet18()
    models = {"batch norm": normed.train(), "MimicNorm": convert(normed, images[:8]).model.train()}
    row: dict[str, Any] = {"network": "torchvision resnet18", "batch": BATCH, "size": size, "rounds": rounds}
    if device == "cpu":
        kept = {name: saved_bytes(model, images[:8], labels[:8]) / 8 for name, model in models.items()}
        row["activation_bytes_per_image"] = {name: round(count) for name, count in kept.items()}
        row["activations_by_batch_norm"] = round(kept["MimicNorm"] / kept["batch norm"], 4)
    else:
        row |= {"device": torch.cuda.get_device_name(), "autocast": "bfloat16" if autocast else None}
    images, labels = images.to(device), labels.to(device)
    steps: dict[str, Callable[[], None]] = {}
    peaks: dict[str, float] = {}
    for name, model in models.items():
        steps[name] = one_step(model.to(device), images, labels, autocast)
        if device == "cuda":
            peaks[name] = peak_bytes(steps[name]) / MIB
    if peaks:
        row["peak_mib_above_weights"] = {name: round(peak) for name, peak in peaks.items()}
        row["peak_by_batch_norm"] = round(peaks["MimicNorm"] / peaks["batch norm"], 4)
    report = measure_latency(steps, rounds=rounds, warmup=1 if device == "cpu" else 5)
    row["median_ms"] = dict(report.median_ms)
    row["step_by_batch_norm"] = round(report.ratios["MimicNorm", "batch norm"], 4)
    keep("cost", row)
    click.echo(json.dumps(row, indent=1))


def one_step(model: nn.Module, images: Tensor, labels: Tensor, autocast: bool = False) -> Callable[[], None]:
    """Return what makes one training step, and waits for it on a GPU."""
    optimizer = make_optimizer(model, 0.01)
    if any(isinstance(module, LastBatchNorm) for module in model.modules()):
        WeightMean(model).attach(optimizer)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()

    return step


def peak_bytes(step: Callable[[], None], steps: int = 3) -> int:
    """Return the highest use of GPU memory in some first steps, above what is there before them."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        step()
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Return how many bytes of activations a forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    return sum(size for pointer, size in kept.items() if pointer not in weights)


if __name__ == "__main__":
    main()
