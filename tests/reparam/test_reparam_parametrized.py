"""Weights that are computed anew become plain ones: parametrizations, and hooks of the older kind."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from repapq_plugin import CalibrationResult, RepAPQConfig, quantize_model
from repapq_plugin.reparam import Branch, BranchSpec, merge_branches, register_branches
from repapq_plugin.reparam.parametrized import bake_parametrizations


def test_what_was_computed_becomes_plain_weights_of_the_same_values():
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    baked, x = copy.deepcopy(model), torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        wanted = model(x)
        assert bake_parametrizations(baked) == ["0.weight"]
        assert type(baked[0]) is nn.Conv2d
        assert isinstance(baked[0]._parameters["weight"], nn.Parameter)
        assert torch.equal(baked(x), wanted)
        assert bake_parametrizations(baked) == []
        # What it was copied from goes on as it was.
        assert parametrize.is_parametrized(model[0], "weight")
        assert torch.equal(model(x), wanted)


def quiet(function: Callable[..., nn.Module], *args: object, **kwargs: object) -> nn.Module:
    """The older functions warn that there are newer ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def pruned(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", amount=0.5)
    prune.random_unstructured(layer, "bias", amount=0.25)
    return layer


def pruned_twice(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", amount=0.25)
    prune.l1_unstructured(layer, "weight", amount=0.25)
    return layer


COMPUTED: dict[str, tuple[Callable[[nn.Module], nn.Module], list[str]]] = {
    "weight norm, hook": (lambda layer: quiet(weight_norm, layer), ["weight"]),
    "weight norm of the whole, hook": (lambda layer: quiet(weight_norm, layer, dim=None), ["weight"]),
    "spectral norm, hook": (lambda layer: quiet(spectral_norm, layer), ["weight"]),
    "weight norm": (parametrizations.weight_norm, ["weight"]),
    "spectral norm": (parametrizations.spectral_norm, ["weight"]),
    "pruned": (pruned, ["weight", "bias"]),
    "pruned twice": (pruned_twice, ["weight"]),
}
every_kind = pytest.mark.parametrize("kind", COMPUTED)


def network(kind: str, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    compute, _ = COMPUTED[kind]
    layers = [compute(nn.Conv2d(3, 8, 3, 2, 1)), nn.ReLU(), compute(nn.Conv2d(8, 8, 3)), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    return nn.Sequential(*layers).eval()


def images() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@every_kind
def test_a_baked_layer_holds_what_a_plain_one_does(kind: str) -> None:
    model, x = network(kind), images()
    with torch.no_grad():
        wanted = model(x)
    assert sorted(bake_parametrizations(model)) == sorted(f"{i}.{name}" for i in (0, 2) for name in COMPUTED[kind][1])
    with torch.no_grad():
        assert torch.equal(model(x), wanted)
    assert set(model.state_dict()) == {f"{i}.{name}" for i in (0, 2, 4) for name in ("weight", "bias")}
    for layer in (model[0], model[2]):
        assert type(layer) is nn.Conv2d and isinstance(layer._parameters["weight"], nn.Parameter)
        assert not layer._forward_pre_hooks and not layer._buffers and "weight" not in vars(layer)
    assert bake_parametrizations(model) == []


@every_kind
def test_what_was_loaded_counts_and_not_what_was_computed_before(kind: str) -> None:
    model, other, x = network(kind), network(kind, seed=1), images()
    with torch.no_grad():
        model(x)
        model.load_state_dict(other.state_dict())
        bake_parametrizations(model)
        assert torch.allclose(model(x), other(x), atol=1e-6)


@every_kind
@pytest.mark.parametrize("gradients", [False, True])
def test_quantized_and_loaded_again(kind: str, gradients: bool, tmp_path) -> None:
    model, x = network(kind), images()
    with torch.set_grad_enabled(gradients):
        model(x)
    result = quantize_model(model, [x], RepAPQConfig(steps=0))
    again = CalibrationResult.load(result.save(tmp_path / "result.safetensors"), model)
    with torch.no_grad():
        assert torch.equal(again.model(x), result.model(x))
        assert (result.model(x) - model(x)).abs().mean() <= 0.05 * model(x).abs().mean()
    assert {"0", "2"} <= set(result.layers)
    assert {"0.weight", "2.weight"} <= set(result.model.state_dict())
    assert bake_parametrizations(model) != [], "the model goes on as it was"


class Branches(nn.Module):
    """A block of which nothing is taught."""

    def __init__(self, compute: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.dense, self.one = compute(nn.Conv2d(3, 3, 3, padding=1)), compute(nn.Conv2d(3, 3, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.dense(x) + self.one(x))


class TaughtBranches(Branches):
    pass


@register_branches(TaughtBranches)
def _taught(block: TaughtBranches) -> BranchSpec:
    return BranchSpec((Branch((block.dense,)), Branch((block.one,))), after=(nn.ReLU(),))


@every_kind
@pytest.mark.parametrize("make", [Branches, TaughtBranches])
@pytest.mark.parametrize("stale", [False, True])
def test_branches_of_computed_weights_are_merged_with_what_is_computed_next(
    kind: str, make: type[Branches], stale: bool
) -> None:
    torch.manual_seed(0)
    block, other = (make(COMPUTED[kind][0]).eval() for _ in range(2))
    x = images()
    if stale:
        block(x)
        block.load_state_dict(other.state_dict())
    merged, (record,) = merge_branches(block)
    assert record.merged
    with torch.no_grad():
        assert torch.allclose(merged(x), block(x), atol=1e-5)


def test_a_layer_without_its_computed_tensor_is_baked_all_the_same() -> None:
    model = network("weight norm, hook")
    wanted = model(images()).detach()
    del model[0].weight
    bake_parametrizations(model)
    assert torch.equal(model(images()), wanted)
