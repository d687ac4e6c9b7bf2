"""A GPU quantizes as the CPU does: the same merges, layers and ranges, within what TF32 rounds; and in good time.

pytest integration/cuda -n 0
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from repapq_plugin import CalibrationResult, RepAPQConfig, export_onnx, quantize_model
from repapq_plugin.core.compare import precise, relative_error
from repapq_plugin.core.tensors import tensors_of
from repapq_plugin.merging import merge_for_inference

NETWORKS = (
    "repvgg_a0",
    "mobileone_s1",
    "fastvit_t8",
    "repvit_m0_9",
    "repghostnet_050",
    "ghostnetv3_050",
    "lcnetv2_base",
    "iformer_t",
    "shvit_s1",
    "efficientvim_m1",
)
"""One full-size network of each family that timm has."""

STEPS, BATCH, PIXELS = 100, 32, 96
LIMIT = 3.0
"""Times the forward and backward of the merged float network that a step of calibration may take."""


def network(name: str) -> nn.Module:
    """Return timm's network with random weights and norm statistics taken from noise."""
    model = timm.create_model(name, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images(16, seed=9))
    return model.eval()


def images(count: int, seed: int, pixels: int = 64) -> Tensor:
    return torch.randn(count, 3, pixels, pixels, generator=torch.Generator().manual_seed(seed))


def quantized(model: nn.Module, device: torch.device, **settings: object) -> CalibrationResult:
    batches = [images(4, seed).to(device) for seed in range(3)]
    return quantize_model(copy.deepcopy(model).to(device), batches, RepAPQConfig.from_dict({"steps": 2, **settings}))


def apart(model: nn.Module, device: torch.device, other: nn.Module) -> float:
    """Relative difference of two networks' outputs, the second one's on the CPU."""
    x = images(4, seed=7)
    with precise():
        return relative_error(outputs(model, x.to(device)), outputs(other, x))


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [tensor.cpu() for tensor in tensors_of(model(x))]


def everything_is_on(device: torch.device, model: nn.Module) -> bool:
    return all(tensor.device.type == device.type for tensor in model.state_dict().values())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_quantized_as_on_the_cpu(name: str, device: torch.device) -> None:
    model = network(name)
    here, there = quantized(model, torch.device("cpu")), quantized(model, device)
    assert everything_is_on(device, there.model)
    assert there.layers == here.layers and there.float_layers == here.float_layers
    assert [(m.name, m.merged) for m in there.merges] == [(m.name, m.merged) for m in here.merges]
    assert there.notes == here.notes  # among them: that channels could not be equalized
    x = images(4, seed=7)
    wanted = outputs(model, x)
    of_cpu = relative_error(outputs(here.model, x), wanted)
    of_gpu = relative_error(outputs(there.model, x.to(device)), wanted)
    assert of_gpu <= 1.25 * of_cpu + 1e-3


def test_channels_are_equalized_although_convolutions_use_tf32(device: torch.device) -> None:
    model = network("mobileone_s1")
    result = quantized(model, device, steps=0)
    plain = quantized(model, device, steps=0, equalize=False)
    assert not [note for note in result.notes if "Equalizing" in note]
    weights = [dict(r.model.named_parameters()) for r in (result, plain)]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0] if key in weights[1])


def test_what_a_gpu_calibrated_computes_the_same_on_the_cpu(device: torch.device, tmp_path: Path) -> None:
    model = network("repvgg_a0")
    result = quantized(model, device, weight_bits=4, activation_bits=4)
    loaded = CalibrationResult.load(result.save(tmp_path / "result.safetensors"), model)
    # Few sums lie so near the middle of two codes that devices round them apart.
    assert apart(result.model, device, loaded.model) < 0.02


def test_onnx_of_a_network_on_the_gpu(device: torch.device, tmp_path: Path) -> None:
    result = quantized(network("repvgg_a0"), device, steps=0)
    summary = export_onnx(result, images(2, seed=3).to(device), tmp_path / "network.onnx")
    assert summary.integer_layers == len(result.layers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_checkpoints(dtype: torch.dtype, device: torch.device) -> None:
    model = network("repvgg_a0").to(dtype)
    batches = [images(4, seed).to(device, dtype) for seed in range(2)]
    result = quantize_model(model.to(device), batches, RepAPQConfig(steps=2))
    assert len(result.layers) == len(quantized(network("repvgg_a0"), torch.device("cpu"), steps=0).layers)
    assert all(bool(torch.isfinite(output).all()) for output in outputs(result.model, batches[0]))


def test_channels_last_and_autocast(device: torch.device) -> None:
    model = network("repvgg_a0").to(device, memory_format=torch.channels_last)
    batches = [images(4, seed).to(device, memory_format=torch.channels_last) for seed in range(2)]

    def forward(net: nn.Module, batch: object) -> object:
        with torch.autocast(device.type, torch.bfloat16):
            return net(batch)

    result = quantize_model(model, batches, RepAPQConfig(steps=2), forward_fn=forward)
    assert result.layers and everything_is_on(device, result.model)


def seconds_of(run: Callable[[], object]) -> float:
    torch.accelerator.synchronize()
    started = time.perf_counter()
    run()
    torch.accelerator.synchronize()
    return time.perf_counter() - started


def peak_of(run: Callable[[], object]) -> int:
    """Bytes of the device that a run needed above what was there."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def test_a_step_takes_not_much_more_than_one_of_the_float_network(device: torch.device) -> None:
    model = network("repvgg_a0").to(device)
    batches = [images(BATCH, seed, PIXELS).to(device) for seed in range(4)]
    merged = merge_for_inference(model, lambda net: net(batches[0])).network

    def steps(count: int = STEPS) -> None:
        for index in range(count):
            merged(batches[index % 4]).square().mean().backward()

    config = RepAPQConfig.from_preset("w4a4", steps=STEPS, schedule="network", stage_weight=0.0)
    steps(10)
    quantize_model(model, batches, config.replace(steps=10))
    of_float = seconds_of(steps)
    fixed = seconds_of(lambda: quantize_model(model, batches, config.replace(steps=1)))
    learning = seconds_of(lambda: quantize_model(model, batches, config)) - fixed
    print(f"float {of_float:.2f} s, learning {learning:.2f} s, all else {fixed:.2f} s for {STEPS} steps")
    assert learning <= LIMIT * of_float


def test_peak_memory_is_that_of_a_training_step(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("peak memory is read from CUDA")
    model = network("repvgg_a0").to(device)
    batches = [images(BATCH, seed, PIXELS).to(device) for seed in range(4)]
    merged = merge_for_inference(model, lambda net: net(batches[0])).network
    step = peak_of(lambda: merged(batches[0]).square().mean().backward())
    config = RepAPQConfig.from_preset("w4a4", steps=5, schedule="network", cache_bytes=0)
    used = peak_of(lambda: quantize_model(model, batches, config))
    print(f"a training step {step / 2**20:.0f} MiB, calibration {used / 2**20:.0f} MiB")
    assert used <= 1.5 * step + sum(p.numel() * 4 * 6 for p in model.parameters())
