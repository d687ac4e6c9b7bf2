"""Merging branches: any taps, groups and series that are exact; everything else is refused."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from integration.reparam.reparam_blocks import TwoBranches, random_input, relative_error, set_norms, two_branches
from repapq_plugin.errors import MergeError
from repapq_plugin.reparam import Branch, BranchSpec, MergedBlock, branches, fuse_branches, merge_branches

Draw = Callable[[st.SearchStrategy[Any]], Any]


def run_branches(spec: BranchSpec, x: Tensor) -> Tensor:
    total = torch.zeros((), dtype=x.dtype)
    for branch in spec.branches:
        y = nn.Sequential(*branch.layers).eval()(x)
        total = total + torch.as_tensor(branch.scale, dtype=x.dtype).reshape(1, -1, 1, 1) * y
    return total


def check_fused(*members: Branch, channels: int = 4, bound: float = 1e-12) -> nn.Conv2d:
    """Fuse in float64, compare with the sum of the branches, return the convolution."""
    spec = BranchSpec(members)
    for seed, branch in enumerate(members):
        for layer in branch.layers:
            layer.double()
            set_norms(layer, seed=seed, low=-2, high=2, mean=2)
    conv = fuse_branches(spec)
    x = random_input(channels)
    with torch.no_grad():
        assert relative_error(conv(x), run_branches(spec, x)) <= bound
    return conv


def test_dilated_and_pointwise_branches_share_a_dilated_kernel() -> None:
    conv = check_fused(
        Branch((nn.Conv2d(4, 6, 3, padding=2, dilation=2), nn.BatchNorm2d(6))), Branch((nn.Conv2d(4, 6, 1),))
    )
    assert (conv.kernel_size, conv.dilation, conv.padding) == ((3, 3), (2, 2), (2, 2))


def test_dilated_and_plain_kernels_meet_on_the_finer_grid() -> None:
    conv = check_fused(
        Branch((nn.Conv2d(4, 4, 3, padding=2, dilation=2),)), Branch((nn.Conv2d(4, 4, 3, padding=1),)), Branch(())
    )
    assert (conv.kernel_size, conv.dilation, conv.padding) == ((5, 5), (1, 1), (2, 2))


def test_a_row_and_a_column_make_a_cross() -> None:
    conv = check_fused(
        Branch((nn.Conv2d(4, 4, (1, 3), padding=(0, 1)),)), Branch((nn.Conv2d(4, 4, (3, 1), padding=(1, 0)),))
    )
    assert conv.kernel_size == (3, 3)
    assert float(conv.weight[:, :, ::2, ::2].abs().max()) == 0


def test_average_pooling_is_a_depthwise_kernel() -> None:
    conv = check_fused(
        Branch((nn.AvgPool2d(3, stride=1, padding=1), nn.BatchNorm2d(4))), Branch((nn.BatchNorm2d(4),)), Branch(())
    )
    assert conv.groups == 4


def test_average_pooling_may_have_its_own_divisor_and_follow_a_convolution() -> None:
    check_fused(
        Branch((nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.AvgPool2d(2, stride=2, divisor_override=3))),
        Branch((nn.Conv2d(4, 6, 2, stride=2),)),
    )


def test_even_kernel_with_same_padding_is_evened_out() -> None:
    conv = check_fused(Branch((nn.Conv2d(4, 4, 2, padding="same"),)), Branch((nn.Conv2d(4, 4, 3, padding="same"),)))
    assert (conv.kernel_size, conv.padding) == ((3, 3), (1, 1))


def test_unpadded_kernels_stay_unpadded() -> None:
    conv = check_fused(Branch((nn.Conv2d(4, 4, 3, padding="valid"),)), Branch((nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))))
    assert conv.padding == (0, 0)


def test_groups_become_the_largest_common_divisor() -> None:
    conv = check_fused(
        Branch((nn.Conv2d(8, 8, 3, padding=1, groups=8),)),
        Branch((nn.Conv2d(8, 8, 1, groups=4),)),
        Branch((nn.BatchNorm2d(8),)),
        channels=8,
    )
    assert conv.groups == 4


def test_scale_may_be_one_number_or_one_per_channel() -> None:
    check_fused(
        Branch((nn.Conv2d(4, 4, 1),), scale=-0.5),
        Branch((nn.Conv2d(4, 4, 3, padding=1),), scale=torch.randn(4)),
        Branch((), scale=nn.Parameter(torch.randn(1, 4, 1, 1))),
    )


def test_nested_sequences_identities_and_dropout_are_seen_through() -> None:
    inner = nn.Sequential(nn.Identity(), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.5)), nn.BatchNorm2d(4))
    check_fused(Branch((inner,)), Branch((nn.Identity(),)))


@st.composite
def random_branches(draw: Draw) -> tuple[Branch, ...]:
    """Branches of one stride whose outputs have one size: centred kernels, or series behind one."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    inputs, outputs = 4 * draw(st.integers(1, 2)), 4 * draw(st.integers(1, 2))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    groups = st.sampled_from([1, 2, 4])
    members = []
    for _ in range(draw(st.integers(1, 3))):
        kernel = draw(st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 5])))
        dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
        padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
        width = draw(st.sampled_from([4, 8]))
        layers: list[nn.Module] = [
            nn.Conv2d(inputs, width, kernel, stride, padding, dilation, draw(groups), draw(st.booleans()))
        ]
        if draw(st.booleans()):
            layers.append(nn.BatchNorm2d(width))
        layers.append(nn.Conv2d(width, outputs, 1, groups=draw(groups), bias=draw(st.booleans())))
        members.append(Branch(tuple(layers), scale=draw(st.floats(-2, 2))))
    if stride == (1, 1) and inputs == outputs:
        members.append(Branch(()))
    return tuple(members)


@settings(max_examples=40, deadline=None)
@given(random_branches())
def test_fused_equals_branched_for_any_branches(members: tuple[Branch, ...]) -> None:
    check_fused(*members, channels=members[0].layers[0].in_channels)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_series_of_convolutions_is_one_convolution(data: st.DataObject) -> None:
    """Only the first layer pads; strides multiply, kernels widen."""
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    layers: list[nn.Module] = []
    channels, groups = 4, st.sampled_from([1, 2, 4])
    for index in range(data.draw(st.integers(2, 3))):
        kernel, stride = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
        padding = data.draw(st.integers(0, 2)) if index == 0 else 0
        layers += [
            nn.Conv2d(channels, 8, kernel, stride, padding, groups=data.draw(groups)),
            nn.BatchNorm2d(8),
        ]
        channels = 8
    spec = BranchSpec((Branch(tuple(layer.double().eval() for layer in layers)),))
    set_norms(nn.Sequential(*layers), seed=0, low=-2, high=2, mean=2)
    conv = fuse_branches(spec)
    for size in ((31, 30), (29, 33), (32, 28)):
        x = random_input(4, size=size)
        with torch.no_grad():
            assert relative_error(conv(x), run_branches(spec, x)) <= 1e-12


def test_padded_layer_behind_a_pointwise_one_without_bias_is_exact() -> None:
    check_fused(Branch((nn.Conv2d(4, 8, 1, stride=2, bias=False), nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4))))


def test_norm_whose_shift_is_zero_may_stand_before_padding() -> None:
    norm = nn.BatchNorm2d(4).double()
    norm.running_var.uniform_(0.5, 2)
    spec = BranchSpec((Branch((norm, nn.Conv2d(4, 4, 3, padding=1, dtype=torch.float64))),))
    x = random_input(4)
    with torch.no_grad():
        assert relative_error(fuse_branches(spec)(x), run_branches(spec, x)) <= 1e-12


def norm_with(**values: float) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(4)
    for name, value in values.items():
        getattr(norm, name).data.fill_(value)
    return norm


def conv3(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, **{"padding": 1, **options})


REFUSED = {
    "not 'zeros'|padding_mode='reflect'": [Branch((conv3(padding_mode="reflect"),))],
    "Conv2dSame computes something of its own": [Branch((Conv2dSame(4, 4, 3),))],
    "a padded layer follows": [Branch((nn.Conv2d(4, 4, 1), norm_with(running_mean=1.0), conv3()))],
    r"strides \(1, 1\) and \(2, 2\)": [Branch((conv3(),)), Branch((nn.Conv2d(4, 4, 1, stride=2),))],
    "different sizes": [Branch((conv3(padding=0),)), Branch(())],
    "ReLU is not a linear layer": [Branch((conv3(), nn.ReLU()))],
    "BatchNormAct2d applies an activation": [Branch((conv3(), BatchNormAct2d(4)))],
    "keeps no running statistics": [Branch((conv3(), nn.BatchNorm2d(4, track_running_stats=False)))],
    "not finite": [Branch((conv3(), norm_with(running_var=float("nan"))))],
    "negative variance": [Branch((conv3(), norm_with(running_var=-1.0)))],
    "leaves padding out of the mean": [Branch((conv3(),)), Branch((nn.AvgPool2d(3, 1, 1, count_include_pad=False),))],
    "ceil_mode": [Branch((conv3(stride=2),)), Branch((nn.AvgPool2d(2, ceil_mode=True),))],
    "no branch holds a convolution": [Branch(()), Branch((nn.AvgPool2d(3, 1, 1),))],
    "scale has 3 elements; give one, or 4": [Branch((conv3(),), scale=torch.ones(3))],
    r"branches have \(4, 4\) and \(8, 4\) channels": [Branch((conv3(),)), Branch((nn.Conv2d(8, 4, 1),))],
    "a layer of 6 channels is given 4": [Branch((conv3(), nn.BatchNorm2d(6)))],
    "not finite in torch.float16": [Branch((conv3(dtype=torch.half), norm_with(weight=1e9)))],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_convolution_is_refused_by_name(message: str) -> None:
    with pytest.raises(MergeError, match=message) as failure:
        fuse_branches(BranchSpec(REFUSED[message]), where="backbone.stage1.0")
    assert str(failure.value).startswith("backbone.stage1.0")


def test_zero_variance_and_dead_channels_give_finite_weights() -> None:
    dead = norm_with(running_var=0.0, running_mean=3.0, bias=0.5)
    dead.eps = 0.0
    pruned = norm_with(weight=0.0, running_mean=1e30, running_var=1e-30)
    conv = fuse_branches(BranchSpec((Branch((conv3(bias=False), dead)), Branch((conv3(bias=False), pruned)))))
    assert float(conv.weight.detach().abs().max()) == 0
    assert conv.bias.tolist() == [0.5] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_the_blocks_own(dtype: torch.dtype) -> None:
    spec = BranchSpec((Branch((conv3(dtype=dtype), nn.BatchNorm2d(4))), Branch((nn.BatchNorm2d(4),))))
    conv = fuse_branches(spec)
    assert conv.weight.dtype == conv.bias.dtype == dtype


def test_merged_weights_are_trainable_if_any_branch_was() -> None:
    frozen = BranchSpec((Branch((conv3().requires_grad_(False),)),))
    mixed = BranchSpec((*frozen.branches, Branch((conv3(),))))
    assert not any(p.requires_grad for p in fuse_branches(frozen).parameters())
    assert all(p.requires_grad and p.is_leaf for p in fuse_branches(mixed).parameters())


@pytest.fixture
def taught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "_BY_CLASS", {**branches._BY_CLASS, TwoBranches: two_branches})


def test_merging_leaves_block_and_random_state_alone(taught: None) -> None:
    model = nn.Sequential(TwoBranches()).train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    merged, _ = merge_branches(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(module.training for module in merged.modules())


def test_inplace_changes_the_model_itself(taught: None) -> None:
    model = nn.Sequential(TwoBranches(), nn.ReLU())
    copied, _ = merge_branches(model)
    assert type(model[0]) is TwoBranches and copied is not model
    merged, _ = merge_branches(model, inplace=True)
    assert merged is model and isinstance(model[0], MergedBlock)


def test_shared_block_is_merged_once_and_stays_shared(taught: None) -> None:
    block = TwoBranches()
    model = nn.ModuleDict({"first": nn.Sequential(block, nn.ReLU()), "second": block})
    merged, records = merge_branches(model)
    assert [record.name for record in records] == ["first.0"]
    assert merged["first"][0] is merged["second"] and isinstance(merged["second"], MergedBlock)


@pytest.mark.parametrize("skip", [["stage.0"], ["stage.*"]])
def test_skipped_blocks_stay(taught: None, skip: list[str]) -> None:
    model = nn.ModuleDict({"stage": nn.Sequential(TwoBranches()), "head": TwoBranches()})
    merged, records = merge_branches(model, skip=skip)
    assert type(merged["stage"][0]) is TwoBranches
    assert [record.name for record in records] == ["head"]


class ForgottenScale(TwoBranches):
    """Its forward does more than its description says."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(1.5 * super().forward(x))


class TwoInputs(TwoBranches):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x + y)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (ForgottenScale(), r"differ by .* of the largest output; the function registered for .*ForgottenScale"),
        (TwoInputs(), r"cannot be run alone on one input.*TypeError"),
    ],
)
def test_block_that_fails_its_check_is_left_alone_and_said_so(
    taught: None, block: nn.Module, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.ModuleDict({"neck": block})
    with caplog.at_level(logging.WARNING):
        merged, (record,) = merge_branches(model)
    assert type(merged["neck"]) is type(block)
    assert not record.merged and record.max_rel_error is None
    assert re.search(reason, record.reason)
    assert f"neck stays as it is: {record.reason}" in caplog.text


def test_unchecked_merge_measures_nothing(taught: None) -> None:
    _, (record,) = merge_branches(nn.Sequential(ForgottenScale()), verify=False)
    assert record.merged and record.max_rel_error is None


def test_branches_that_cancel_are_judged_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 the sum of two large opposite branches is mostly rounding; the merge is right all the same."""

    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.plus, self.minus = norm_with(weight=1e7), norm_with(weight=-1e7, bias=1.0)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.plus(y) + self.minus(y) * (1 - 1e-7)

    def describe(block: Cancelling) -> BranchSpec:
        return BranchSpec((Branch((block.conv, block.plus)), Branch((block.conv, block.minus), scale=1 - 1e-7)))

    monkeypatch.setattr(branches, "_BY_CLASS", {Cancelling: describe})
    torch.manual_seed(0)
    merged, (record,) = merge_branches(nn.Sequential(Cancelling()))
    assert record.merged and record.max_rel_error > 1e-4
