"""QPR among NNCF's hooks: in front of what NNCF hooked behind a layer, and folded without changing a code."""

from __future__ import annotations

import copy

import pytest
import torch
from nncf.torch.function_hook import get_hook_storage
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph
from nncf.torch.quantization.layers import BaseQuantizer
from torch import Tensor, nn

from integration.nncf.conftest import Case
from repapq_plugin.core.tensors import floating_tensors
from repapq_plugin.hosts.nncf.affine import attach_affine, can_take_affine, fold_affine
from repapq_plugin.hosts.nncf.placement import Placement, find_placement
from repapq_plugin.quantizers.layers import ChannelAffine


def place(model: nn.Module, x: Tensor) -> Placement:
    return find_placement(model, build_nncf_graph(model, x), lambda: model(x))


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return floating_tensors(model(x))


@pytest.fixture(params=["eight", "pyramid"])
def model_and_x(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    case: Case = request.getfixturevalue(request.param)
    return copy.deepcopy(case.result.model), case.unseen


def test_an_affine_layer_changes_nothing_until_it_learns_and_leaves_no_trace(
    model_and_x: tuple[nn.Module, Tensor],
) -> None:
    model, x = model_and_x
    before, placement = run(model, x), place(model, x)
    names = [name for name, _ in get_hook_storage(model).named_hooks()]
    affines = {}
    for name, placed in placement.weights.items():
        assert can_take_affine(placed)
        affines[name] = attach_affine(model, placed)
    assert all(torch.equal(a, b) for a, b in zip(run(model, x), before, strict=True))
    for name, affine in affines.items():
        fold_affine(model, placement.weights[name], affine)
    assert [name for name, _ in get_hook_storage(model).named_hooks()] == names
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(run(model, x), before, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_the_fold_keeps_every_code_and_the_sign_goes_into_them(
    model_and_x: tuple[nn.Module, Tensor], seed: int
) -> None:
    model, x = model_and_x
    torch.manual_seed(seed)
    placement = place(model, x)
    for placed in placement.activations:
        placed.quantizer.enabled.fill_(0)  # rounding would turn float noise into steps
    codes, affines = {}, {}
    for name, placed in placement.weights.items():
        codes[name] = _codes(placed.module, placed.quantizer)
        affine = affines[name] = attach_affine(model, placed)
        with torch.no_grad():
            affine.gamma.uniform_(0.5, 1.5).mul_(torch.where(torch.rand_like(affine.gamma) < 0.3, -1.0, 1.0))
            affine.beta.normal_(0, 0.1)
    unfolded = run(model, x)
    for name, placed in placement.weights.items():
        signs = affines[name].gamma.sign()
        axis = 1 if isinstance(placed.module, nn.ConvTranspose2d) else 0
        fold_affine(model, placed, affines[name])
        shape = [1] * codes[name].dim()
        shape[axis] = -1
        assert torch.equal(_codes(placed.module, placed.quantizer), codes[name] * signs.reshape(shape))
    for a, b in zip(run(model, x), unfolded, strict=True):
        assert float((a - b).abs().max()) < 1e-4 * float(b.abs().max())


def _codes(layer: nn.Module, quantizer: BaseQuantizer) -> Tensor:
    with torch.no_grad():
        return torch.round(quantizer.quantize(layer.weight) * quantizer.level_high / quantizer.scale)


def test_it_stands_in_front_of_nncfs_own_hook(pyramid: Case) -> None:
    model = copy.deepcopy(pyramid.result.model)
    placement = place(model, pyramid.unseen)
    affine = attach_affine(model, placement.weights["up"])  # NNCF quantizes what comes out of it
    behind = list(get_hook_storage(model).post_hooks["up/conv_transpose2d/0__0"].values())
    assert behind[0] is affine and len(behind) >= 2
    assert isinstance(affine, ChannelAffine)


def test_layers_without_bias_or_with_one_scale_get_none(eight: Case) -> None:
    placement = place(copy.deepcopy(eight.result.model), eight.unseen)
    placed = placement.weights["fc"]
    placed.module.bias = None
    assert not can_take_affine(placed)
