"""Tensors of nested values: found in order, and put back."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from repapq_plugin.core.tensors import floating_tensors, members_of, rebuilt, tensors_of, with_tensors

Pair = namedtuple("Pair", "left right")


@dataclass
class Boxes:
    scores: Tensor
    name: str


class DataElement:
    """Like mmengine's: no mapping, but with ``items()``."""

    def __init__(self, **members: object) -> None:
        self.members = members

    def items(self) -> list[tuple[str, object]]:
        return list(self.members.items())


leaves = st.builds(lambda value: torch.tensor(float(value)), st.integers(-5, 5))
others = st.none() | st.integers() | st.text(max_size=2)
nested = st.recursive(
    leaves | others,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=8,
)


@given(nested)
def test_putting_back_what_was_found_gives_the_same(value: object) -> None:
    tensors = tensors_of(value)
    again = with_tensors(value, iter(tensors))
    found = tensors_of(again)
    assert len(found) == len(tensors) and all(a is b for a, b in zip(found, tensors, strict=True))
    assert repr(again) == repr(value)


@given(nested)
def test_new_tensors_take_the_places_in_order(value: object) -> None:
    new = [torch.full((2,), float(index)) for index, _ in enumerate(tensors_of(value))]
    found = tensors_of(with_tensors(value, iter(new)))
    assert len(found) == len(new) and all(a is b for a, b in zip(found, new, strict=True))


class Answer(OrderedDict):
    """Like transformers' outputs: items may be set, ``update`` is refused."""

    def update(self, *_: object) -> None:
        raise TypeError("not here")


@dataclass(frozen=True)
class Named:
    name: str
    value: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.value, Tensor):
            raise TypeError(self.name)


def test_a_container_is_made_anew_without_its_constructor() -> None:
    answer = Answer()
    answer["a"] = torch.zeros(2)
    again = with_tensors(answer, iter([torch.ones(2)]))
    assert type(again) is Answer and torch.equal(again["a"], torch.ones(2)) and not answer["a"].any()
    named = rebuilt(Named("x", torch.zeros(2)), lambda member: None if isinstance(member, Tensor) else member)
    assert (named.name, named.value) == ("x", None)
    locked = rebuilt(MappingProxyType({"a": 1}), lambda member: -member)
    assert locked == {"a": -1}


def test_tensors_are_found_in_every_container() -> None:
    a, b, c, d, e = torch.arange(5).unbind()
    value = [a, {"x": (b, "text")}, Boxes(c, "name"), DataElement(y=OrderedDict(z=[d])), Pair(e, None)]
    assert [int(tensor) for tensor in tensors_of(value)] == [0, 1, 2, 3, 4]


def test_classes_are_no_containers() -> None:
    assert members_of(Boxes) is None and tensors_of([Boxes, dict, DataElement]) == []


def test_other_classes_can_count_as_tensors() -> None:
    class Stand:
        pass

    stand = Stand()
    assert tensors_of([stand, 1]) == [] and tensors_of([stand, 1], Stand) == [stand]


def test_floating_tensors_leave_out_integers() -> None:
    assert floating_tensors([torch.ones(1), torch.ones(1, dtype=torch.int64)]) == [torch.ones(1)]
