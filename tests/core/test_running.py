"""Running a model leaves no trace: modes, gradients and generators come back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repapq_plugin.core import running
from repapq_plugin.core.running import (
    call_model,
    frozen,
    inference,
    is_out_of_memory,
    random_states,
    seeded,
    set_random_states,
)


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2)), nn.Dropout())
    model[0].eval()
    model[0].weight.requires_grad_(False)
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_modes_come_back_after_inference() -> None:
    model = network()
    before = modes(model)
    with inference(model):
        assert not any(modes(model)) and not torch.is_grad_enabled()
    assert modes(model) == before and torch.is_grad_enabled()


def test_modes_come_back_after_an_error() -> None:
    model = network()
    before = modes(model)
    with pytest.raises(ValueError), inference(model):
        raise ValueError
    assert modes(model) == before


def test_a_train_method_of_its_own_is_not_called() -> None:
    class Own(nn.Linear):
        def train(self, mode: bool = True):
            raise AssertionError("called")

    with inference(Own(1, 1)):
        pass


@pytest.mark.parametrize("fails", [False, True])
def test_gradients_come_back_after_freezing(fails: bool) -> None:
    model = network()
    before = [parameter.requires_grad for parameter in model.parameters()]
    try:
        with frozen(model):
            assert not any(parameter.requires_grad for parameter in model.parameters())
            if fails:
                raise ValueError
    except ValueError:
        pass
    assert [parameter.requires_grad for parameter in model.parameters()] == before


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(0, 5))
def test_seeding_leaves_the_generators_as_they_were(seed: int, draws: int) -> None:
    state = torch.get_rng_state()
    with seeded(seed):
        torch.rand(draws)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_seed_gives_one_sequence() -> None:
    with seeded(3):
        first = torch.rand(4)
    torch.rand(1)
    with seeded(3):
        assert torch.equal(torch.rand(4), first)
    with seeded(4):
        assert not torch.equal(torch.rand(4), first)


def test_generators_come_back_after_an_error() -> None:
    state = torch.get_rng_state()
    with pytest.raises(ValueError), seeded(0):
        torch.rand(1)
        raise ValueError
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_is_called_with_what_a_batch_holds() -> None:
    class Adds(nn.Module):
        def forward(self, x: torch.Tensor, y: float = 0.0) -> torch.Tensor:
            return x + y

    x = torch.ones(1)
    assert float(call_model(Adds(), x)) == 1
    assert float(call_model(Adds(), (x, "labels"))) == 1
    assert float(call_model(Adds(), [x, "labels"])) == 1
    assert float(call_model(Adds(), {"x": x, "y": 2.0})) == 3


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("DefaultCPUAllocator"), False),
    ],
)
def test_full_memory_is_told_from_other_errors(error: Exception, full: bool) -> None:
    assert is_out_of_memory(error) == full


def test_the_states_of_random_generators_come_back() -> None:
    torch.rand(3)
    states = random_states()
    drawn = torch.rand(5)
    torch.manual_seed(77)
    set_random_states(states)
    assert torch.equal(torch.rand(5), drawn)


def test_the_states_of_accelerators_come_back_on_those_that_are_still_there(monkeypatch: pytest.MonkeyPatch) -> None:
    generators = {number: torch.Generator().manual_seed(number) for number in (0, 1)}
    fake = SimpleNamespace(
        get_rng_state=lambda number: generators[number].get_state(),
        set_rng_state=lambda state, number: generators[number].set_state(state),
    )
    monkeypatch.setattr(torch, "fake", fake, raising=False)
    monkeypatch.setattr(running, "_accelerators", lambda: ("fake", [0, 1]))
    states = random_states()
    assert set(states) == {"cpu", "fake:0", "fake:1"}
    drawn = torch.rand(5, generator=generators[1])
    monkeypatch.setattr(running, "_accelerators", lambda: ("fake", [1, 2]))
    set_random_states(states)
    assert torch.equal(torch.rand(5, generator=generators[1]), drawn)
