"""Modules are replaced wherever they stand, and nowhere else; modules play roles and stay themselves."""

from __future__ import annotations

import copy
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable
from io import BytesIO
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from repapq_plugin.core.modules import become, own_class, places_of, replace_modules, resign

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


class Doubling(nn.Module):
    """A role: twice what the module's own forward gives, and some more per call."""

    more: float

    def forward(self, *args: object) -> Tensor:
        own = cast(Callable[..., Tensor], super().forward)
        return 2 * own(*args) + vars(self).get("more", 0.0)


class Negating(nn.Module):
    """Another role."""

    def forward(self, *args: object) -> Tensor:
        own = cast(Callable[..., Tensor], super().forward)
        return -own(*args)


class Counted(ABC):
    """A class whose metaclass is not ``type``."""

    @abstractmethod
    def count(self) -> int: ...


class Users(nn.Linear, Counted):
    """A class of a user: attributes, a property that can be set, a method, a child, a buffer, a forward of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.gate = nn.Sigmoid()
        self.register_buffer("offset", torch.ones(outputs))
        self.tags, self._gain = ["first"], 3.0

    @property
    def gain(self) -> float:
        return self._gain

    @gain.setter
    def gain(self, value: float) -> None:
        self._gain = value

    def count(self) -> int:
        return len(self.tags)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.gate(super().forward(x)) + self.offset


def users() -> tuple[Users, Users, Tensor]:
    """A module, its copy, and an input."""
    torch.manual_seed(0)
    module = Users(3, 2)
    return module, copy.deepcopy(module), torch.randn(4, 3)


def test_a_module_in_a_role_is_the_same_object_of_both_classes_and_runs_its_own_forward_inside() -> None:
    module, plain, x = users()
    played = become(module, Doubling)
    assert played is module and isinstance(played, Doubling) and isinstance(played, Users)
    assert own_class(played) is Users and own_class(plain) is Users
    assert torch.equal(played(x), 2 * plain(x))


def test_attributes_properties_children_and_names_of_the_state_stay() -> None:
    module, plain, x = users()
    state, contents = list(module.state_dict()), dict(vars(module))
    played = become(module, Doubling)
    assert list(played.state_dict()) == state == list(plain.state_dict())
    assert vars(played) == contents
    assert [name for name, _ in played.named_modules()] == ["", "gate"]
    assert played.gain == 3.0 and played.count() == 1 and played.tags == ["first"]
    played.gain = plain.gain = 5.0
    played.tags.append("second")
    assert played.count() == 2
    assert torch.equal(played(x), 2 * plain(x))
    with pytest.raises(AttributeError, match="nowhere"):
        played.nowhere  # noqa: B018


def test_hooks_from_before_and_from_within_a_role_go_on_working() -> None:
    module, plain, x = users()
    seen: list[str] = []
    before = module.register_forward_hook(lambda *_: seen.append("before"))
    played = become(module, Doubling)
    played.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    assert torch.equal(played(x), 2 * plain(x + 1))
    resign(played)
    assert torch.equal(module(x), plain(x + 1)) and seen == ["before"] * 2
    before.remove()
    module(x)
    assert seen == ["before"] * 2


def test_who_resigns_is_what_it_was() -> None:
    module, plain, x = users()
    contents = dict(vars(module))
    assert resign(become(module, Doubling)) is module
    assert type(module) is Users and vars(module) == contents
    assert torch.equal(module(x), plain(x))
    assert resign(module) is module and type(module) is Users


def test_a_role_that_is_played_is_exchanged_and_not_played_inside_another() -> None:
    module, plain, x = users()
    become(become(module, Doubling), Negating)
    assert isinstance(module, Negating) and not isinstance(module, Doubling)
    assert own_class(module) is Users
    assert torch.equal(module(x), -plain(x))
    assert type(become(module, Negating)) is type(module)
    assert torch.equal(module(x), -plain(x))


def test_modules_of_one_class_in_one_role_have_one_class() -> None:
    one, other = become(Users(3, 2), Doubling), become(Users(5, 4), Doubling)
    assert type(one) is type(other)
    assert type(become(Users(3, 2), Negating)) is not type(one)
    assert type(become(nn.Linear(3, 2), Doubling)) is not type(one)
    assert type(one).__name__ == "Doubling[Users]"


def deep_copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module)


def pickled(module: nn.Module) -> nn.Module:
    return cast(nn.Module, pickle.loads(pickle.dumps(module)))


def saved(module: nn.Module) -> nn.Module:
    file = BytesIO()
    torch.save(module, file)
    file.seek(0)
    return cast(nn.Module, torch.load(file, weights_only=False))


@pytest.mark.parametrize("copied", [deep_copy, pickled, saved])
def test_a_copy_plays_the_role_with_what_the_role_has_added(copied: Callable[[nn.Module], nn.Module]) -> None:
    module, plain, x = users()
    played = become(module, Doubling)
    played.more = 0.5
    played.gain = plain.gain = 7.0
    again = copied(nn.Sequential(played, nn.Identity()))[0]
    assert type(again) is type(played) and own_class(again) is Users
    assert torch.equal(again(x), 2 * plain(x) + 0.5)
    assert again.weight is not module.weight and again.tags is not played.tags
    with torch.no_grad():
        again.weight.zero_()
    assert torch.equal(played(x), 2 * plain(x) + 0.5)
    assert type(resign(again)) is Users


def test_a_shallow_copy_shares_the_parameters_and_not_the_role() -> None:
    module, plain, x = users()
    played = become(module, Doubling)
    again = copy.copy(played)
    assert again.weight is played.weight
    assert torch.equal(become(again, Negating)(x), -plain(x))
    assert torch.equal(played(x), 2 * plain(x))


def test_a_network_with_modules_in_roles_trains_moves_and_loads_states() -> None:
    network = nn.Sequential(nn.Linear(3, 3), become(Users(3, 2), Doubling))
    network.load_state_dict(nn.Sequential(nn.Linear(3, 3), Users(3, 2)).state_dict())
    assert not network.eval()[1].training and network.train()[1].gate.training
    assert network.double()(torch.randn(1, 3).double()).dtype == torch.float64
    network(torch.randn(4, 3).double()).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
