"""A merged block stays the user's own module: class, attributes, hooks and names; it copies, pickles and saves."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn

from repapq_plugin.reparam import (
    Branch,
    BranchSpec,
    MergedBlock,
    find_unknown_multibranch,
    fold_conv_norm_pairs,
    merge_branches,
    register_branches,
)
from repapq_plugin.reparam.take_over import RewrittenBlock
from tests.support.numerics import random_input, relative_error, set_norms


def conv(size: int, channels: int = 4) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, size, padding=size // 2)


class Taught(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.dense, self.norm, self.one = conv(3), nn.BatchNorm2d(4), conv(1)
        self.act = nn.SiLU() if act is None else act

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.norm(self.dense(input)) + self.one(input))


@register_branches(Taught)
def _taught(block: Taught) -> BranchSpec:
    return BranchSpec((Branch((block.dense, block.norm)), Branch((block.one,))), after=(block.act,))


class Stranger(nn.Module):
    """A chain behind the branches."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.one, self.act = conv(3), conv(1), nn.ReLU()

    def forward(self, image: Tensor) -> Tensor:
        return self.act(self.dense(image) + self.one(image))


class Inside(nn.Module):
    """Branches in the middle of a forward; the layer behind them stands in a list, and tensors are read by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([conv(3), conv(1), conv(3)])
        self.factor = nn.Parameter(torch.rand(4, 1, 1))
        self.register_buffer("shift", torch.rand(4, 1, 1), persistent=False)
        self.register_buffer("strides", torch.arange(3))
        self.plain = torch.rand(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.layers[0](x) + self.layers[1](x))
        return nn.functional.relu(self.layers[2](y) * self.factor.exp() + self.shift + self.plain) + x


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.one = conv(3), conv(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x) + (self.one(x) if bool(x.sum() < 1e30) else x)


BLOCKS = {"taught": Taught, "chain": Stranger, "inside": Inside, "untraceable": Untraceable}
KEYS = {
    "taught": ["conv.weight", "conv.bias"],
    "chain": ["conv.weight", "conv.bias"],
    "inside": [
        *("factor", "shift", "plain"),
        *("layers.2.weight", "layers.2.bias", "merged.conv.weight", "merged.conv.bias"),
    ],
    "untraceable": ["conv.weight", "conv.bias"],
}
every_block = pytest.mark.parametrize("kind", BLOCKS)


def block_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    block = BLOCKS[kind]().eval()
    set_norms(block, seed=0, low=-1, high=1, mean=1)
    block.f, block.i, block.np = [-1, 4], 7, 1234
    return block.double()


def merged_in_place(block: nn.Module) -> nn.Module:
    model = nn.ModuleDict({"stem": block})
    same, (record,) = merge_branches(model, inplace=True)
    assert same is model and record.merged and record.name == "stem"
    return model["stem"]


@every_block
def test_a_merged_block_is_the_same_object_of_its_own_class_with_its_attributes(kind: str) -> None:
    block, x = block_of(kind), random_input(4)
    with torch.no_grad():
        wanted = block(x)
    merged = merged_in_place(block)
    assert merged is block and isinstance(block, BLOCKS[kind])
    assert isinstance(block, RewrittenBlock if kind == "inside" else MergedBlock)
    assert (block.f, block.i, block.np) == ([-1, 4], 7, 1234) and not block.training
    with torch.no_grad():
        assert relative_error(block(x), wanted) <= 1e-12


@every_block
def test_keys_of_its_state_are_those_of_its_merged_form(kind: str) -> None:
    assert sorted(merged_in_place(block_of(kind)).state_dict()) == sorted(KEYS[kind])


def test_tensors_of_its_own_that_its_forward_does_not_read_can_still_be_read() -> None:
    block = merged_in_place(block_of("inside"))
    assert block.strides.tolist() == [0, 1, 2] and "strides" not in block.state_dict()


@every_block
def test_the_model_itself_may_be_a_block(kind: str) -> None:
    block = block_of(kind)
    merged, _ = merge_branches(block, inplace=True)
    assert merged is block
    copied, _ = merge_branches(block_of(kind))
    assert type(copied) is type(block)


@every_block
def test_own_hooks_run_once_per_call_and_are_not_merged_in(kind: str) -> None:
    block, x = block_of(kind), random_input(4)
    seen: list[str] = []
    block.register_forward_pre_hook(lambda _, args: (seen.append("before"), (2 * args[0],))[1])
    block.register_forward_hook(lambda _, args, output: (seen.append("after"), 3 * output)[1])
    with torch.no_grad():
        wanted = block(x)
    seen.clear()
    merged = merged_in_place(block)
    assert seen == [], "merging must not call what the user put on the block"
    with torch.no_grad():
        assert relative_error(merged(x), wanted) <= 1e-12
    assert seen == ["before", "after"]


@pytest.mark.parametrize("kind", ["taught", "chain", "untraceable"])
def test_a_hook_of_a_branch_that_changes_what_it_gives_is_never_lost(kind: str) -> None:
    block, x = block_of(kind), random_input(4)
    block.one.register_forward_hook(lambda _, args, output: output + 100)
    with torch.no_grad():
        wanted = block(x)
    merged, _ = merge_branches(block)
    with torch.no_grad():
        assert relative_error(merged(x), wanted) <= 1e-12


def unpickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def loaded(module: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, unpickled, loaded])
@every_block
def test_it_copies_pickles_and_saves(kind: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    block, x = merged_in_place(block_of(kind)), random_input(4)
    again = duplicate(block)
    with torch.no_grad():
        assert torch.equal(again(x), block(x))
        for parameter in again.parameters():
            parameter.zero_()
        assert not torch.equal(again(x), block(x)), "a copy has weights of its own"
    assert type(again) is type(block) and again.f == [-1, 4] and list(again.state_dict()) == list(block.state_dict())


@every_block
def test_merging_again_changes_nothing(kind: str) -> None:
    block = merged_in_place(block_of(kind))
    keys = list(block.state_dict())
    again, records = merge_branches(nn.Sequential(block))
    assert records == [] and list(again[0].state_dict()) == keys
    assert find_unknown_multibranch(again, lambda net: net(random_input(4))) == []


@pytest.mark.parametrize(("kind", "name"), [("taught", "input"), ("chain", "image"), ("inside", "x")])
def test_its_input_may_be_given_by_its_own_name(kind: str, name: str) -> None:
    block, x = merged_in_place(block_of(kind)), random_input(4)
    with torch.no_grad():
        assert torch.equal(block(**{name: x}), block(x))


@every_block
def test_modes_come_back(kind: str) -> None:
    block = block_of(kind).train()
    merged = merged_in_place(block)
    assert all(module.training for module in merged.modules())


@every_block
def test_a_merged_block_is_traced_and_exported(kind: str) -> None:
    block, x = merged_in_place(block_of(kind)), random_input(4)
    with torch.no_grad():
        for other in (fx.symbolic_trace(block), torch.jit.trace(block, x), torch.export.export(block, (x,)).module()):
            assert relative_error(other(x), block(x)) <= 1e-12


def test_what_follows_the_branches_is_found_under_its_old_name_too() -> None:
    block = block_of("taught")
    act = block.act
    merged = merged_in_place(block)
    assert merged.act is act and merged.after[0] is act
    with pytest.raises(AttributeError, match="dense"):
        _ = merged.dense
    silent = merged_in_place(Taught(nn.Identity()).eval())
    assert type(silent.act) is nn.Identity and len(silent.after) == 0


class Occupied(Taught):
    """Its own names are those that a merged block would give."""

    after = "the class's"

    def __init__(self) -> None:
        super().__init__()
        self.conv = "the block's"


@pytest.mark.parametrize("duplicate", [lambda block: block, copy.deepcopy, unpickled])
def test_names_that_the_block_has_are_left_to_it(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    block, x = Occupied().eval().double(), random_input(4)
    with torch.no_grad():
        wanted = block(x)
        merged = duplicate(merged_in_place(block))
        assert relative_error(merged(x), wanted) <= 1e-12
    assert (merged.conv, merged.after) == ("the block's", "the class's")
    assert list(merged.state_dict()) == ["conv_.weight", "conv_.bias"]
    assert merged.get_submodule("conv_").kernel_size == (3, 3) and isinstance(merged.act, nn.SiLU)


def test_a_forward_that_was_put_on_the_block_itself_does_not_outlive_its_branches() -> None:
    block, x = block_of("taught"), random_input(4)
    block.forward = lambda input: block.act(block.dense(input) + block.one(input))
    block.norm = nn.Identity()
    with torch.no_grad():
        wanted = block(x)
        assert relative_error(merged_in_place(block)(x), wanted) <= 1e-12


def test_a_container_that_others_hold_as_well_keeps_all_its_children() -> None:
    block = block_of("inside")
    model = nn.ModuleDict({"block": block, "others": block.layers})
    merged, _ = merge_branches(model)
    assert [type(layer) for layer in merged["others"]] == [nn.Conv2d] * 3
    assert list(merged["block"].layers._modules) == ["2"] and isinstance(merged["block"].layers, nn.ModuleList)
    assert merged["block"].layers._modules["2"] is merged["others"][2]


class BranchedConv(nn.Conv2d):
    """A layer that is a block."""

    def __init__(self) -> None:
        super().__init__(4, 4, 3, padding=1)
        self.one = conv(1)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.one(input)


@register_branches(BranchedConv)
def _branched_conv(block: BranchedConv) -> BranchSpec:
    own = conv(3)
    own._parameters = {name: block._parameters[name] for name in ("weight", "bias")}
    return BranchSpec((Branch((own,)), Branch((block.one,))))


def traced() -> nn.Module:
    return fx.symbolic_trace(Stranger())


@pytest.mark.parametrize("make", [BranchedConv, traced])
def test_what_cannot_go_on_hands_its_attributes_and_hooks_on(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    block, x = make().eval().double(), random_input(4)
    block.f, block.i = -1, 3
    block.register_forward_hook(lambda _, args, output: 2 * output)
    block.register_forward_hook(lambda _, args, kwargs, output: 5 + output, with_kwargs=True)
    model = nn.Sequential(block)
    with torch.no_grad():
        wanted = model(x)
        merged, (record,) = merge_branches(model, inplace=True)
        assert record.merged and isinstance(merged[0], MergedBlock)
        assert (merged[0].f, merged[0].i) == (-1, 3)
        assert relative_error(copy.deepcopy(merged)(x), wanted) <= 1e-12


class Pair(NamedTuple):
    image: Tensor
    pooled: Tensor


@dataclasses.dataclass
class Found:
    image: Tensor
    pooled: Tensor


class Several(Stranger):
    """Gives more than one tensor."""

    def __init__(self, kind: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, image: Tensor) -> object:
        y = self.act(self.dense(image) + self.one(image))
        return self.kind(y, y.mean((2, 3)))


def as_tuple(image: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
    return image, pooled


def as_dict(image: Tensor, pooled: Tensor) -> dict[str, Tensor]:
    return {"image": image, "pooled": pooled}


@pytest.mark.parametrize("kind", [as_tuple, as_dict, Pair, Found])
def test_several_outputs_stay_what_they_are(kind: Callable[[Tensor, Tensor], object]) -> None:
    torch.manual_seed(0)
    block, x = Several(kind).eval().double(), random_input(4)
    with torch.no_grad():
        wanted = block(x)
        merged = unpickled(merged_in_place(block))
        actual = merged(x)
    assert type(actual) is type(wanted)
    values = [
        list(value.values()) if isinstance(value, dict) else [value.image, value.pooled]
        if hasattr(value, "image") else list(value) for value in (actual, wanted)
    ]  # fmt: skip
    assert all(relative_error(one, other) <= 1e-12 for one, other in zip(*values, strict=True))


class TaughtTuple(Taught):
    def forward(self, input: Tensor) -> tuple[Tensor]:
        return (super().forward(input),)


def test_a_taught_block_that_gives_no_tensor_stays() -> None:
    block = TaughtTuple().eval()
    merged, (record,) = merge_branches(block)
    assert not record.merged and "gives tuple and no tensor" in record.reason
    assert type(merged) is TaughtTuple


class OwnState(Stranger):
    """Does not pickle what cannot be."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = lambda: 1

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in vars(self).items() if key != "reader"}


def test_a_state_of_its_own_is_what_is_pickled() -> None:
    torch.manual_seed(0)
    block, x = merged_in_place(OwnState().eval().double()), random_input(4)
    again = unpickled(block)
    assert isinstance(again, OwnState) and isinstance(again, MergedBlock) and not hasattr(again, "reader")
    with torch.no_grad():
        assert torch.equal(again(x), block(x))


def test_a_scripted_child_stays_what_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(torch.jit.script(nn.Sequential(conv(3), nn.ReLU())), Stranger()).eval().double()
    x = random_input(4)
    with torch.no_grad():
        wanted = model(x)
        merged, records = merge_branches(model)
        assert [record.name for record in records if record.merged] == ["1"]
        assert relative_error(merged(x), wanted) <= 1e-12


class OwnSequential(nn.Sequential):
    """Runs its children and adds the input."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input


@pytest.mark.parametrize("verify", [True, False])
def test_a_sequential_with_a_forward_of_its_own_is_not_read_as_its_children(verify: bool) -> None:
    block = Taught().eval()
    block.dense = OwnSequential(conv(3))
    merged, (record,) = merge_branches(block, verify=verify)
    assert not record.merged and "OwnSequential is not a linear layer" in record.reason


def test_a_norm_that_is_folded_hands_its_attributes_on() -> None:
    model = nn.Sequential(conv(3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    for index, layer in enumerate(model):
        layer.f, layer.i = -1, index
    assert fold_conv_norm_pairs(model, lambda net: net(random_input(4).float())) == [("0", "1")]
    assert type(model[1]) is nn.Identity and [(layer.f, layer.i) for layer in model] == [(-1, 0), (-1, 1), (-1, 2)]
