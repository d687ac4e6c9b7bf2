"""What belongs to the caller is copied: models of every kind, and batches of every form."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from repapq_plugin.core.copies import changed, is_half, own_batch, own_copy, smaller, takes_halves, unwrapped
from repapq_plugin.core.tensors import tensors_of
from repapq_plugin.errors import HostError


class Keeps(nn.Module):
    """Keeps tensors of its last run, graph and all, in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("last", torch.zeros(1))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.last, self.cached, self.seen = y.sum().reshape(1), y, [y, y * 2]
        return y


def test_a_model_that_keeps_tensors_with_their_graph_is_copied() -> None:
    model = Keeps()
    wanted = model(torch.ones(4, 3))
    copied = own_copy(model)
    assert copied.cached.grad_fn is None and torch.equal(copied.cached, wanted)
    assert copied.seen[1].grad_fn is None and copied.last.grad_fn is None
    assert model.cached.grad_fn is not None, "the caller's model keeps its graph"
    assert torch.equal(copied(torch.ones(4, 3)), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32_and_the_caller_keeps_halves(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(dtype)
    copied = own_copy(model)
    assert is_half(model) and not is_half(copied)
    assert {t.dtype for t in copied.state_dict().values()} == {torch.float32, torch.int64}
    assert all(p.dtype == dtype for p in model.parameters())
    takes_halves(copied)
    x = torch.randn(2, 3, 5, 5).to(dtype)
    assert torch.equal(copied(x), copied(x.float()))


def test_double_precision_stays() -> None:
    assert own_copy(nn.Linear(2, 2).double()).weight.dtype == torch.float64


def test_a_model_of_inference_mode_becomes_an_ordinary_one() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    copied = own_copy(model)
    assert not any(tensor.is_inference() for tensor in (*copied.parameters(), *copied.buffers()))
    assert all(isinstance(parameter, nn.Parameter) for parameter in copied.parameters())
    copied(torch.randn(2, 3)).sum().backward()


def test_copying_inside_inference_mode_gives_an_ordinary_model() -> None:
    model = nn.Linear(3, 2)
    with torch.inference_mode():
        copied = own_copy(model)
    copied(torch.randn(2, 3)).sum().backward()


def test_hooks_of_the_copy_reach_the_copy() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.count = nn.Linear(2, 2), 0
            self.layer.register_forward_hook(self.note)

        def note(self, *_: object) -> None:
            self.count += 1

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    model = Counts()
    copied = own_copy(model)
    copied(torch.ones(1, 2))
    assert (model.count, copied.count) == (0, 1)


def test_wrappers_are_taken_off() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert unwrapped(nn.DataParallel(model)) is model
    assert unwrapped(torch.compile(model)) is model
    assert unwrapped(nn.DataParallel(torch.compile(model))) is model
    assert own_copy(nn.DataParallel(model))(torch.ones(1, 2)).shape == (1, 2)


def test_wrappers_inside_are_taken_off_unless_they_carry_hooks() -> None:
    wrapped = nn.DataParallel(torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager"))
    model = nn.Sequential(wrapped, nn.ReLU(), wrapped)
    copied = own_copy(model)
    assert [name for name, _ in copied.named_modules()] == ["", "0", "0.0", "1"] and copied[0] is copied[2]
    assert torch.equal(copied(torch.ones(1, 2)), model(torch.ones(1, 2)))
    assert isinstance(model[0], nn.DataParallel)
    wrapped.register_forward_hook(lambda _, args, output: 2 * output)
    assert isinstance(own_copy(model)[0], nn.DataParallel)


def test_views_of_one_memory_become_tensors_of_their_own_and_shared_ones_stay_one() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            flat = torch.arange(12.0)
            self.whole, self.part = nn.Parameter(flat[:6].reshape(2, 3)), nn.Parameter(flat[3:6])
            self.turned, self.apart = nn.Parameter(self.whole.detach().t()), nn.Parameter(flat[6:])
            self.same = self.whole
            self.register_buffer("kept", self.apart.detach()[1:2])
            self.register_buffer("nothing", torch.zeros(0))

    model = Views()
    copied = own_copy(model)
    for name, value in model.state_dict().items():
        assert torch.equal(copied.state_dict()[name], value)
    assert copied.same is copied.whole and copied.turned.stride() == model.turned.stride()
    names = ("whole", "part", "turned", "apart", "kept")
    for number, name in enumerate(names):
        with torch.no_grad():
            getattr(copied, name).fill_(-1.0 - number)
    assert [float(getattr(copied, name).max()) for name in names] == [-1.0, -2.0, -3.0, -4.0, -5.0]


def test_models_without_values_are_refused_by_name() -> None:
    with pytest.raises(HostError, match=r"'0.weight' has no values yet.*run the model once"):
        own_copy(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(HostError, match="meta device.*load the checkpoint"):
        own_copy(nn.Linear(2, 2, device="meta"))


def test_what_cannot_be_copied_is_said() -> None:
    class Locked(nn.Linear):
        def __deepcopy__(self, memo: dict[int, object]) -> nn.Module:
            raise TypeError("locked")

    with pytest.raises(HostError, match="Locked cannot be copied .TypeError: locked."):
        own_copy(Locked(2, 2))


class Pair(NamedTuple):
    images: Tensor
    sizes: list[Tensor]


@dataclass
class Sample:
    images: Tensor
    name: str = "x"


BATCHES = [
    torch.ones(4, 3),
    (torch.ones(4, 3), 7),
    [torch.ones(4, 3)],
    {"a": torch.ones(4, 3), "b": None},
    OrderedDict(a=torch.ones(4, 3)),
    UserDict(a=torch.ones(4, 3)),
    Pair(torch.ones(4, 3), [torch.ones(4)]),
    Sample(torch.ones(4, 3)),
]


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: type(batch).__name__)
def test_a_batch_is_copied_in_its_own_form(batch: object) -> None:
    copied = own_batch(batch)
    assert type(copied) is type(batch)
    before: list[Tensor] = []
    changed(batch, lambda tensor: before.append(tensor) or tensor)  # type: ignore[func-returns-value]
    changed(copied, lambda tensor: tensor.zero_())
    assert before and all(bool((tensor == 1).all()) for tensor in before)


def test_batches_of_inference_mode_and_in_half_precision_become_ordinary() -> None:
    with torch.inference_mode():
        batch = (torch.ones(2, 3).half(),)
        copied = own_batch(batch)[0]
    assert not copied.is_inference() and copied.dtype == torch.float32


def test_half_of_a_batch_is_taken_where_its_tensors_agree_in_their_number() -> None:
    assert smaller({"a": torch.ones(4, 3), "b": torch.ones(4)})["a"].shape == (2, 3)  # type: ignore[index]
    assert smaller((torch.ones(4, 3), torch.ones(3))) is None
    assert smaller(torch.ones(1, 3)) is None
    assert smaller("no tensor") is None
    listed = smaller({"inputs": [torch.ones(3, 8, 8)] * 4, "data_samples": ["a", "b", "c", "d"]})
    assert listed is not None and [len(value) for value in listed.values()] == [2, 2]
    assert listed["inputs"][0].shape == (3, 8, 8)  # type: ignore[union-attr]
    assert smaller({"inputs": [torch.ones(3, 8, 8)] * 4, "data_samples": ["a"]}) is None


@pytest.mark.parametrize("whole", [UserDict(images=torch.ones(4, 3)), Sample(torch.ones(4, 3))])
def test_half_of_a_batch_has_its_form(whole: object) -> None:
    half = smaller(whole)
    assert type(half) is type(whole)
    assert [tensor.shape for tensor in tensors_of(half)] == [(2, 3)]
    assert [tensor.shape for tensor in tensors_of(whole)] == [(4, 3)]
