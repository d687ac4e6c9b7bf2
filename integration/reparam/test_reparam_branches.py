"""Teaching a block class its branches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from integration.reparam.reparam_blocks import TwoBranches, random_input, relative_error, set_norms, two_branches
from repapq_plugin.errors import MergeError
from repapq_plugin.reparam import (
    Branch,
    BranchSpec,
    MergedBlock,
    branches,
    branches_of,
    merge_branches,
    register_branches,
)


@pytest.fixture(autouse=True)
def forget_what_a_test_teaches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(branches, "_BY_CLASS", dict(branches._BY_CLASS))
    monkeypatch.setattr(branches, "_BY_NAME", dict(branches._BY_NAME))
    yield


def test_foreign_block_is_taught_in_a_few_lines() -> None:
    block = TwoBranches().eval()
    set_norms(block, seed=0, low=-2, high=2, mean=2)
    assert branches_of(block) is None
    register_branches(TwoBranches, two_branches)
    merged, (record,) = merge_branches(block)
    assert isinstance(merged, MergedBlock) and record.branches == 3
    x = random_input(4).float()
    assert relative_error(merged(x), block(x)) <= 1e-5


def test_decorator_registers_and_returns_the_function() -> None:
    @register_branches(TwoBranches)
    def describe(block: TwoBranches) -> BranchSpec:
        return two_branches(block)

    assert len(branches_of(TwoBranches()).branches) == 3
    assert len(describe(TwoBranches()).branches) == 3


def test_class_may_be_named_instead_of_imported() -> None:
    register_branches("integration.reparam.reparam_blocks.TwoBranches", two_branches)
    assert len(branches_of(TwoBranches()).branches) == 3


def test_registering_again_replaces() -> None:
    register_branches(TwoBranches, two_branches)
    register_branches(TwoBranches, lambda block: BranchSpec((Branch((block.conv1,)),)))
    assert len(branches_of(TwoBranches()).branches) == 1


def test_subclass_inherits_and_may_override() -> None:
    class Child(TwoBranches):
        pass

    register_branches(TwoBranches, two_branches)
    assert len(branches_of(Child()).branches) == 3
    register_branches(f"{Child.__module__}.{Child.__qualname__}", lambda block: None)
    assert branches_of(Child()) is None
    assert len(branches_of(TwoBranches()).branches) == 3


def test_function_that_returns_something_else_is_named() -> None:
    register_branches(TwoBranches, lambda block: [block.conv1])
    with pytest.raises(MergeError, match=r"TwoBranches returned \[Conv2d.*return a BranchSpec"):
        branches_of(TwoBranches())


def test_function_that_fails_is_named_and_the_block_is_left_alone() -> None:
    register_branches(TwoBranches, lambda block: block.no_such_layer)
    with pytest.raises(MergeError, match=r"TwoBranches failed: AttributeError.*no_such_layer"):
        branches_of(TwoBranches())
    model = nn.Sequential(TwoBranches())
    merged, (record,) = merge_branches(model)
    assert type(merged[0]) is TwoBranches
    assert not record.merged and record.branches == 0 and "no_such_layer" in record.reason


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BranchSpec(branches=()), "one or more Branch"),
        (lambda: BranchSpec(branches=((nn.Conv2d(1, 1, 1),),)), "one or more Branch"),
        (lambda: BranchSpec(branches=(Branch(()),), after=(torch.relu,)), "not an nn.Module"),
        (lambda: Branch((nn.Conv2d(1, 1, 1), None)), "None, which is not an nn.Module"),
    ],
)
def test_descriptions_refuse_members_of_the_wrong_type(make: object, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        make()


def test_lists_are_taken_for_tuples() -> None:
    layer = nn.Conv2d(1, 1, 1)
    assert BranchSpec([Branch([layer])], after=[layer]) == BranchSpec((Branch((layer,)),), after=(layer,))
