"""Hooks come off again, whatever happens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from repapq_plugin.core.hooks import Hooks, unseen
from repapq_plugin.core.watch import FunctionWatch


def hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))


def test_hooks_run_around_a_forward_and_come_off() -> None:
    model, seen = network(), []
    with Hooks() as hooks:
        hooks.before(model[0], lambda _, args: seen.append(("before", args[0].shape)))
        hooks.after(model[0], lambda _, args, output: seen.append(("after", output.shape)))
        model(torch.ones(5, 2))
    assert seen == [("before", (5, 2)), ("after", (5, 3))]
    assert hooks_on(model) == 0
    model(torch.ones(5, 2))
    assert len(seen) == 2


def test_what_a_hook_returns_takes_the_place_of_what_it_was_given() -> None:
    layer = nn.Identity()
    with Hooks() as hooks:
        hooks.before(layer, lambda _, args: (args[0] + 1,))
        hooks.after(layer, lambda _, args, output: output * 10)
        assert float(layer(torch.tensor(1.0))) == 20
    assert float(layer(torch.tensor(1.0))) == 1


def test_a_hook_may_see_keywords() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor, *, y: Tensor) -> Tensor:
            return x + y

    layer, seen = Adds(), {}
    with Hooks() as hooks:
        hooks.after(layer, lambda _, args, kwargs, output: seen.update(kwargs), with_kwargs=True)
        layer(torch.zeros(1), y=torch.ones(1))
    assert list(seen) == ["y"]


def test_hooks_come_off_when_the_run_fails() -> None:
    model = network()
    with pytest.raises(RuntimeError), Hooks() as hooks:
        for layer in model:
            hooks.before(layer, lambda *_: None)
            hooks.after(layer, lambda *_: None)
        model(torch.ones(5, 7))
    assert hooks_on(model) == 0


def test_hooks_come_off_when_putting_one_on_fails_half_way() -> None:
    class Refuses(nn.ReLU):
        def register_forward_hook(self, *_: object, **__: object):
            raise TypeError("no hooks here")

    model = nn.Sequential(nn.Linear(2, 3), Refuses(), nn.Linear(3, 1))
    with pytest.raises(TypeError, match="no hooks here"), Hooks() as hooks:
        for layer in model:
            hooks.before(layer, lambda *_: None)
            hooks.after(layer, lambda *_: None)
    assert hooks_on(model) == 0


def test_hooks_of_others_stay() -> None:
    model = network()
    model[0].register_forward_hook(lambda *_: None)
    with Hooks() as hooks:
        hooks.after(model[0], lambda *_: None)
    assert hooks_on(model) == 1


def test_what_runs_unseen_is_not_watched() -> None:
    class Names(FunctionWatch):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def after(self, name: str, *_: object) -> None:
            self.names.append(name)

    x = torch.ones(1)
    with Names() as watch:
        torch.exp(x)
        with unseen():
            torch.sin(x)
        torch.cos(x)
    assert watch.names == ["exp", "cos"]
