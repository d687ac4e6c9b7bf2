"""A module run alone computes exactly what it computes inside the whole model, hooks and all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from nncf import Dataset
from nncf.quantization.algorithms.min_max.algorithm import MinMaxQuantization
from nncf.quantization.algorithms.pipeline import Pipeline
from nncf.torch.function_hook import get_hook_storage, wrap_model
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper
from timm.utils import reparameterize_model
from torch import Tensor, nn

from integration.openmmlab.scenes import CONFIGS, DETECTOR, random_model
from repapq_plugin.core.tensors import floating_tensors
from repapq_plugin.hosts.nncf.running import counting_skipped, run_alone, watch_calls
from repapq_plugin.hosts.openmmlab import TensorPath
from repapq_plugin.method.partition import find_stages, find_units
from repapq_plugin.method.replay import answering
from repapq_plugin.quantizers.trace import trace_network
from repapq_plugin.reparam.merge import merge_branches
from tests.support.networks import Chain, Pyramid, settle


def _timm(name: str) -> nn.Module:
    return reparameterize_model(timm.create_model(name, pretrained=False, num_classes=10).eval())


def _detector(config: Path) -> nn.Module:
    model, _ = merge_branches(random_model(config), inplace=True, verify=False)
    return TensorPath(model).eval()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "lists of stages": (lambda: settle(Chain(widths=(8, 12))), 16),
    "a shared head": (lambda: settle(Pyramid()), 16),
    "repvgg_a0": (lambda: _timm("repvgg_a0"), 32),
    "mobileone_s0": (lambda: _timm("mobileone_s0"), 32),
    "repghostnet_050": (lambda: _timm("repghostnet_050"), 32),
    "repvit_m0_9": (lambda: _timm("repvit_m0_9"), 64),
    "fastvit_t8": (lambda: _timm("fastvit_t8"), 64),
    "yolov6-n": (lambda: _detector(DETECTOR), 64),
    "rtmdet-ins": (lambda: _detector(CONFIGS / "rtmdet-ins_fashion.py"), 64),
}


def quantized(network: nn.Module, x: Tensor) -> nn.Module:
    """NNCF's placement and ranges, without the rest of its pipeline."""
    pipeline = Pipeline([[MinMaxQuantization(subset_size=1)]])
    model: nn.Module = pipeline.run(GraphModelWrapper(wrap_model(network), x), Dataset([x])).model
    assert not get_hook_storage(model).is_empty()
    return model.eval()


@pytest.fixture(scope="module", params=NETWORKS)
def watched(request: pytest.FixtureRequest) -> dict[str, Any]:
    build, size = NETWORKS[request.param]
    torch.manual_seed(0)
    network, x = build(), torch.randn(1, 3, size, size)
    trace = trace_network(network, lambda: network(x))
    units = find_units(network, trace, trace.layers)
    stages = find_stages(network, trace, units)
    model = quantized(network, x)
    found = dict.fromkeys([unit.name for unit in units] + [stage.name for stage in stages])
    names = [name for name in found if trace.modules[name].tensor_to_tensor]
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str, into: dict[str, list[Tensor]]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
            with torch._C.DisableTorchFunction():
                into[name].append((args[0] if output is None else output).detach().clone())

        return hook

    with torch.no_grad():
        handles = [model.get_submodule(name).register_forward_pre_hook(keep(name, inputs)) for name in names]
        handles += [model.get_submodule(name).register_forward_hook(keep(name, outputs)) for name in names]
        whole = floating_tensors(model(x))
        for handle in handles:
            handle.remove()
        calls = watch_calls(model, names, lambda: model(x))
    return {
        "model": model, "x": x, "whole": whole, "units": units, "stages": stages,
        "inputs": inputs, "outputs": outputs, "calls": calls,
    }  # fmt: skip


def test_every_unit_and_stage_alone_equals_the_whole_model(watched: dict[str, Any]) -> None:
    assert len(watched["inputs"]) >= 5
    worst = 0.0
    with torch.no_grad():
        for name, inputs in watched["inputs"].items():
            alone = run_alone(watched["model"], name, [x.clone() for x in inputs], watched["calls"][name])
            assert len(alone) == len(watched["outputs"][name]) >= 1
            for ours, whole in zip(alone, watched["outputs"][name], strict=True):
                worst = max(worst, float((ours - whole).abs().max()))
    assert worst == 0.0


def test_a_model_whose_modules_answer_from_a_cache_equals_the_whole_model(watched: dict[str, Any]) -> None:
    model, calls = watched["model"], watched["calls"]
    names = [stage.name for stage in watched["stages"] if stage.name in watched["outputs"]]
    modules = dict(model.named_modules())
    for skipped in (names[:1], names[: len(names) // 2], names):
        stored = {name: [y.clone() for y in watched["outputs"][name]] for name in skipped}
        with torch.no_grad(), counting_skipped(model, calls), answering(modules, stored):
            outputs = floating_tensors(model(watched["x"]))
        assert [float((a - b).abs().max()) for a, b in zip(outputs, watched["whole"], strict=True)] == [0.0] * len(
            outputs
        )


def test_the_model_itself_stays_usable_after_an_error_inside_a_part(watched: dict[str, Any]) -> None:
    model, name = watched["model"], next(iter(watched["inputs"]))
    with pytest.raises(RuntimeError), torch.no_grad():
        run_alone(model, name, [torch.zeros(1, 1, 1, 1, 1)] * len(watched["calls"][name]), watched["calls"][name])
    with torch.no_grad():
        outputs = floating_tensors(model(watched["x"]))
    assert all(torch.equal(a, b) for a, b in zip(outputs, watched["whole"], strict=True))


def test_gradients_reach_weights_and_ranges_of_a_part(watched: dict[str, Any]) -> None:
    model, (name, inputs) = watched["model"], next(iter(watched["inputs"].items()))
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    sum(
        y.square().sum() for y in run_alone(model, name, [x.clone() for x in inputs], watched["calls"][name])
    ).backward()
    reached = {key for key, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    model.zero_grad()
    assert any(key.startswith(f"{name}.") and key.endswith("weight") for key in reached)
    assert any("_scale_param_storage" in key for key in reached)
