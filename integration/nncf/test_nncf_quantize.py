"""`quantize` in place of `nncf.quantize`: what comes back is what NNCF users expect, nearer to the float model."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from pathlib import Path
from typing import Any

import nncf
import nncf.torch
import openvino
import pytest
import torch
from nncf.torch.function_hook import get_hook_storage
from nncf.torch.quantization.layers import BaseQuantizer, SymmetricQuantizer
from torch import Tensor, nn

from integration.nncf.conftest import Case
from repapq_plugin import RepAPQConfig
from repapq_plugin.core.tensors import floating_tensors
from repapq_plugin.export.openvino import layer_kernels
from repapq_plugin.hosts.nncf import RangeClamp, quantize
from repapq_plugin.hosts.nncf.quantization import TARGET_OF, quantize_with_record
from repapq_plugin.job import merge_for_inference
from tests.support.networks import Chain, settle

OURS = ("nncf.*", "repapq_plugin.*")


def hooks(model: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    named = get_hook_storage(model).named_hooks(remove_duplicate=False)
    return {name: hook for name, hook in named if isinstance(hook, kind)}


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return floating_tensors(model(x))


def distance(model: nn.Module, case: Case) -> float:
    pairs = list(zip(outputs(model, case.unseen), outputs(case.network, case.unseen), strict=True))
    return sum(float((a - b).abs().mean() / b.abs().mean()) for a, b in pairs) / len(pairs)


def same(a: nn.Module, b: nn.Module, x: Tensor) -> bool:
    return all(torch.equal(p, q) for p, q in zip(outputs(a, x), outputs(b, x), strict=True))


@pytest.fixture(scope="module", params=["eight", "four", "pyramid"])
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def merged(chain: nn.Module) -> nn.Module:
    with torch.no_grad():
        network, *_ = merge_for_inference(chain, lambda model: model(torch.zeros(1, 3, 16, 16)))
    return network


@pytest.fixture(scope="module")
def by_nncf(merged: nn.Module, eight: Case) -> nn.Module:
    return nncf.quantize(merged, eight.dataset, subset_size=64)


OWN_ARGUMENTS = {"repapq", "checkpoint_dir", "resume"}


def test_the_signature_is_nncfs_and_a_few_more() -> None:
    theirs, ours = inspect.signature(nncf.quantize).parameters, inspect.signature(quantize).parameters
    assert set(theirs) - {"mode"} == set(ours) - OWN_ARGUMENTS  # mode is FP8's, which NNCF refuses for PyTorch
    assert all(ours[key].default == theirs[key].default for key in set(ours) - OWN_ARGUMENTS)


def test_the_result_is_nncfs_with_nncfs_own_placement(by_nncf: nn.Module, eight: Case) -> None:
    ours, theirs = hooks(eight.result.model, BaseQuantizer), hooks(by_nncf, BaseQuantizer)
    assert list(ours) == list(theirs)
    for name, quantizer in ours.items():
        assert type(quantizer) is type(theirs[name])
        for key in ("num_bits", "level_low", "level_high", "signed", "narrow_range", "scale_shape"):
            assert getattr(quantizer, key) == getattr(theirs[name], key), (name, key)
    assert not hooks(eight.result.model, RangeClamp)


def test_it_is_nearer_to_float_than_nncfs_own(by_nncf: nn.Module, eight: Case, four: Case) -> None:
    assert distance(eight.result.model, eight) < 0.6 * distance(by_nncf, eight)
    starting = quantize(four.network, four.dataset, repapq=four.config.replace(steps=0))
    assert distance(four.result.model, four) < 0.8 * distance(starting, four)


def test_the_users_model_stays_as_it_is(case: Case) -> None:
    twin = copy.deepcopy(case.network).train()
    twin.requires_grad_(False)
    before = copy.deepcopy(twin.state_dict())
    attributes = {name: set(vars(module)) for name, module in twin.named_modules()}
    quantize(twin, nncf.Dataset(case.images[:2]), repapq=case.config.replace(steps=1))
    assert twin.training and not any(p.requires_grad for p in twin.parameters())
    assert all(torch.equal(value, before[key]) for key, value in twin.state_dict().items())
    assert {name: set(vars(module)) for name, module in twin.named_modules()} == attributes


def test_every_unit_was_learned_and_most_results_stay(case: Case) -> None:
    units = case.result.units
    assert {name for unit in units for name in case.result.layers if name.startswith(unit.name)} == set(
        case.result.layers
    )
    assert sum(unit.kept for unit in units) >= len(units) / 2
    assert all(unit.loss_after <= unit.loss_before * 1.3 for unit in units)
    assert all(hook.enabled.item() == 1 for hook in hooks(case.result.model, BaseQuantizer).values())
    assert not any("could not be run alone" in unit.note for unit in units)


def test_ranges_are_positive_numbers(case: Case) -> None:
    for quantizer in hooks(case.result.model, SymmetricQuantizer).values():
        assert not quantizer.is_using_log_scale_storage
        assert bool((quantizer.scale > 0).all()) and bool(torch.isfinite(quantizer.scale).all())


def test_few_bits_are_carried_in_quantizers_of_eight(four: Case) -> None:
    model = four.result.model
    assert {quantizer.num_bits for quantizer in hooks(model, BaseQuantizer).values()} == {8}
    assert four.result.layers["stem.conv"] == (7, 8)  # NNCF keeps half of the first layer's codes free
    assert four.result.layers["fc"] == (8, 8)
    inner = [name for name in four.result.layers if name not in ("stem.conv", "fc")]
    assert inner and all(four.result.layers[name] == (4, 4) for name in inner)
    seen: dict[str, int] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda layer, args, name=name: seen.update({name: len(args[0].unique())})
        )
        for name in inner
    ]
    outputs(model, four.unseen)
    for handle in handles:
        handle.remove()
    assert set(seen) == set(inner) and max(seen.values()) <= 16
    for name in inner:
        rows = model.get_submodule(name).weight.detach().flatten(1)
        assert max(len(row.unique()) for row in rows) <= 15


def test_calls_of_one_layer_share_one_quantizer(pyramid: Case) -> None:
    found = hooks(pyramid.result.model, BaseQuantizer)
    calls = {name: hook for name, hook in found.items() if name.startswith("pre_hooks.tower/0/conv2d/")}
    assert len(calls) == 2 and len(set(calls.values())) == 1
    assert pyramid.result.layers["tower.0"] == (6, 6)


class Tied(nn.Module):
    """Two layers with one weight, each with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first, self.second = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.second.weight = self.first.weight
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x).relu()).relu()
        return self.last(self.second(x).relu())


def test_layers_that_share_a_weight_share_its_quantizer() -> None:
    network, images = Tied().eval(), [torch.randn(1, 3, 8, 8) for _ in range(32)]
    model = quantize(network, nncf.Dataset(images), repapq=RepAPQConfig.from_preset("w4a4", steps=10))
    found = hooks(model, BaseQuantizer)
    assert found["pre_hooks.first/conv2d/0__1.0"] is found["pre_hooks.second/conv2d/0__1.0"]
    assert model.first.weight is model.second.weight
    assert max(len(row.unique()) for row in model.first.weight.detach().flatten(1)) <= 15
    x = torch.randn(8, 3, 8, 8)
    wanted, got = outputs(network, x)[0], outputs(model, x)[0]
    assert float((got - wanted).abs().mean()) < 0.35 * float(wanted.abs().mean())


@pytest.mark.parametrize("affine", [True, False])
def test_no_hook_of_the_calibration_is_left(four: Case, affine: bool) -> None:
    model = quantize(four.network, nncf.Dataset(four.images[:4]), repapq=four.config.replace(steps=1, affine=affine))
    kinds = Counter(type(hook).__name__ for hook in hooks(model, nn.Module).values())
    assert set(kinds) == {"SymmetricQuantizer", "RangeClamp"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_second_run_gives_the_same(four: Case) -> None:
    torch.rand(3)  # another state of the generator
    assert same(quantize(four.network, four.dataset, repapq=four.config), four.result.model, four.unseen)


def test_openvino_computes_what_torch_does_in_integers(
    case: Case, by_nncf: nn.Module, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    core = openvino.Core()
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    converted = openvino.convert_model(case.result.model, example_input=case.images[0])
    compiled = core.compile_model(converted, "CPU", exact)
    wanted = outputs(case.result.model, case.unseen)
    for ours, theirs in zip(compiled(case.unseen.numpy()).values(), wanted, strict=True):
        error = (torch.as_tensor(ours) - theirs).abs()
        assert float(error.mean()) < 0.02 * float(theirs.abs().mean())
    if len(wanted) == 1:
        reference = core.compile_model(openvino.convert_model(by_nncf, example_input=case.images[0]), "CPU", exact)
        ours, theirs = (
            sum(kernel.endswith("I8") for kernel in layer_kernels(each).values()) for each in (compiled, reference)
        )
        assert ours == theirs > 0


def test_the_graph_has_no_operator_more_than_nncfs(by_nncf: nn.Module, eight: Case) -> None:
    counts = [
        Counter(op.get_type_name() for op in openvino.convert_model(model, example_input=eight.images[0]).get_ops())
        for model in (eight.result.model, by_nncf)
    ]
    assert counts[0] == counts[1]


def test_config_and_state_bring_the_model_back(case: Case) -> None:
    model = case.result.model
    config = nncf.torch.get_config(model)
    restored = nncf.torch.load_from_config(_bare(case), config, allowed_modules=OURS)
    restored.load_state_dict(model.state_dict())
    assert same(restored.eval(), model, case.unseen)


def test_eight_bits_need_no_more_than_nncf_to_come_back(eight: Case) -> None:
    restored = nncf.torch.load_from_config(_bare(eight), nncf.torch.get_config(eight.result.model))
    restored.load_state_dict(eight.result.model.state_dict())
    assert same(restored.eval(), eight.result.model, eight.unseen)


def _bare(case: Case) -> nn.Module:
    """The merged float model, as the user of a checkpoint makes it."""
    with torch.no_grad():
        network, *_ = merge_for_inference(case.network, lambda model: model(case.images[0]))
    return network


@pytest.mark.parametrize("name", ["eight", "four"])
def test_strip_gives_torchs_own_quantizers(name: str, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue(name)
    model = copy.deepcopy(case.result.model)
    stripped = nncf.strip(model, example_input=case.images[0])
    assert not hooks(stripped, BaseQuantizer)
    a, b = outputs(stripped, case.unseen)[0], outputs(case.result.model, case.unseen)[0]
    # Both round to the same grid, but torch multiplies by the inverse step: single codes may flip.
    assert float((a - b).abs().mean()) < 0.02 * float(b.abs().mean())


def test_training_goes_on(eight: Case) -> None:
    model = copy.deepcopy(eight.result.model).train()
    assert all(p.requires_grad for name, p in model.named_parameters() if name.endswith(("weight", "bias")))
    x = torch.cat(eight.images)
    target = eight.network(x).detach() + 1
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(12):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    scales = [quantizer.scale for quantizer in hooks(model, SymmetricQuantizer).values()]
    assert all(scale.grad is not None for scale in scales)
    assert any(bool(scale.grad.abs().sum() > 0) for scale in scales if scale.grad is not None)


def test_a_copy_computes_the_same(case: Case) -> None:
    assert same(copy.deepcopy(case.result.model), case.result.model, case.unseen)


def test_presets_devices_and_ignored_scopes_are_nncfs(chain: nn.Module) -> None:
    images = [torch.randn(1, 3, 16, 16) for _ in range(8)]
    model = quantize(
        chain,
        nncf.Dataset(images),
        preset=nncf.QuantizationPreset.MIXED,
        target_device=nncf.TargetDevice.CPU,
        ignored_scope=nncf.IgnoredScope(names=["fc/linear/0"]),
        repapq=RepAPQConfig.from_preset("w6a6", steps=5, keep_float=("stages.0.0.conv",)),
    )
    names = {type(hook).__name__ for hook in hooks(model, BaseQuantizer).values()}
    assert names == {"SymmetricQuantizer", "AsymmetricQuantizer"}
    weights = [name for name in hooks(model, BaseQuantizer) if name.startswith("pre_hooks")]
    assert not any("fc/" in name for name in weights)
    assert len(weights) == 4  # stem and three of four blocks; the fourth is kept float
    x = torch.randn(8, 3, 16, 16)
    wanted, got = outputs(chain, x)[0], outputs(model, x)[0]
    assert float((got - wanted).abs().mean()) < 0.3 * float(wanted.abs().mean())


@pytest.mark.parametrize(
    ("device", "said", "target"),
    [
        (nncf.TargetDevice.ANY, "generic", "generic"),
        (nncf.TargetDevice.CPU, "generic", "openvino"),
        (nncf.TargetDevice.GPU, "generic", "openvino"),
        (nncf.TargetDevice.NPU, "openvino", "openvino"),
    ],
)
def test_a_device_stands_for_a_target(chain: nn.Module, device: nncf.TargetDevice, said: str, target: str) -> None:
    images = nncf.Dataset([torch.randn(1, 3, 16, 16) for _ in range(2)])
    config = RepAPQConfig(steps=0, equalize=False, target=said)
    made = quantize_with_record(chain, images, target_device=device, repapq=config)
    assert made.config.runs_on.name == target
    assert set(TARGET_OF) == {device for device in nncf.TargetDevice if device.name != "CPU_SPR"}


def test_a_merged_network_is_taken_as_well(merged: nn.Module, eight: Case) -> None:
    model = quantize(merged, nncf.Dataset(eight.images[:16]), repapq=eight.config.replace(steps=2))
    assert distance(model, eight) < 0.1


def test_dict_and_tuple_items_are_arguments() -> None:
    class Two(Chain):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x + y)

    network = Two(widths=(8,), depth=1)
    plain = settle(Chain(widths=(8,), depth=1))
    network.load_state_dict(plain.state_dict())
    network.eval()
    x = [torch.randn(1, 3, 16, 16) for _ in range(8)]
    config = RepAPQConfig(steps=1)
    as_tuple = quantize(network, nncf.Dataset([(item, item) for item in x]), repapq=config)
    as_dict = quantize(network, nncf.Dataset([{"x": item, "y": item} for item in x]), repapq=config)
    with torch.no_grad():
        assert torch.equal(as_tuple(x[0], x[0]), as_dict(x[0], x[0]))
        wanted = network(x[0], x[0])
        assert float((as_tuple(x[0], x[0]) - wanted).abs().mean()) < 0.1 * float(wanted.abs().mean())
