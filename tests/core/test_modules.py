"""Modules are replaced wherever they stand, and nowhere else."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from repapq_plugin.core.modules import parameter_uses, places_of, replace_modules

trees = st.recursive(
    st.builds(nn.Identity) | st.builds(nn.ReLU),
    lambda inner: st.lists(inner, min_size=1, max_size=3).map(lambda children: nn.Sequential(*children)),
    max_leaves=10,
)


@given(trees)
def test_every_place_is_replaced_and_the_rest_stays(model: nn.Module) -> None:
    old = [module for module in model.modules() if isinstance(module, nn.ReLU)]
    names = [(name, type(module)) for name, module in model.named_modules()]
    replaced = replace_modules(model, {module: nn.Tanh() for module in old})
    kinds = {nn.ReLU: nn.Tanh}
    assert [(name, type(module)) for name, module in replaced.named_modules()] == [
        (name, kinds.get(kind, kind)) for name, kind in names
    ]


def test_a_shared_module_is_replaced_in_all_its_places() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(shared, nn.Sequential(shared), nn.Tanh())
    assert places_of(model, shared) == [(model, "0"), (model[1], "0")]
    new = nn.GELU()
    assert replace_modules(model, {shared: new}) is model
    assert model[0] is new and model[1][0] is new and places_of(model, shared) == []


def test_what_is_put_in_is_not_looked_into() -> None:
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer)
    replace_modules(model, {layer: nn.Sequential(layer, nn.BatchNorm1d(2))})
    assert model[0][0] is layer


def test_the_model_itself_may_be_replaced() -> None:
    model, new = nn.ReLU(), nn.Tanh()
    assert replace_modules(model, {model: new}) is new


def test_parameters_are_counted_by_the_modules_that_hold_them() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    second.weight = first.weight
    uses = parameter_uses(nn.Sequential(first, second, first))
    assert uses[id(first.weight)] == 2 and uses[id(first.bias)] == 1
    assert uses[id(torch.ones(1))] == 0
