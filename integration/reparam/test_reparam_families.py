"""Fused equals branched, for random blocks of every known family; the host's own fuse agrees."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmpretrain.models.backbones import MobileOne, RepLKNet, RepVGG, RIFormer
from mmpretrain.models.backbones.repvgg import RepVGGBlock as MMPretrainRepVGGBlock
from mmyolo.models.layers.yolo_bricks import PPYOLOEBasicBlock, RepStageBlock
from mmyolo.models.layers.yolo_bricks import RepVGGBlock as MMYoloRepVGGBlock
from torch import nn

from integration.reparam.reparam_blocks import FAMILIES, random_input, relative_error, set_norms, with_hard_norms
from repapq_plugin.reparam import MergedBlock, branches_of, fuse_branches, merge_branches

RANDOM_BLOCKS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])

every_family = pytest.mark.parametrize("family", FAMILIES)


def deploy(block: nn.Module) -> None:
    """The host's own fuse."""
    (block.switch_to_deploy if hasattr(block, "switch_to_deploy") else block.reparameterize)()


def deployed_conv(block: nn.Module) -> nn.Conv2d:
    names = ("rbr_reparam", "branch_reparam", "reparam_conv")
    return next(getattr(block, name) for name in names if hasattr(block, name))


@every_family
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_fused_equals_branched(family: str, dtype: torch.dtype, bound: float) -> None:
    @RANDOM_BLOCKS
    @given(with_hard_norms(FAMILIES[family]))
    def check(block: nn.Module) -> None:
        block.to(dtype)
        spec = branches_of(block)
        merged = MergedBlock(fuse_branches(spec), spec.after)
        x = random_input(merged.conv.in_channels).to(dtype)
        with torch.no_grad():
            wanted = block(x.clone())
            actual = merged(x.clone())
        assert actual.dtype == dtype
        assert relative_error(actual, wanted) <= bound

    check()


@every_family
def test_weights_agree_with_the_hosts_own_fuse(family: str) -> None:
    @RANDOM_BLOCKS
    @given(with_hard_norms(FAMILIES[family]))
    def check(block: nn.Module) -> None:
        block.double()
        conv = fuse_branches(branches_of(block))
        deploy(block)
        theirs = deployed_conv(block)
        assert conv.weight.shape == theirs.weight.shape
        assert (conv.stride, conv.padding, conv.groups) == (theirs.stride, theirs.padding, theirs.groups)
        # A kernel of one tap has no spacing; theirs keeps the one that its branches were given.
        assert conv.dilation == (theirs.dilation if conv.kernel_size != (1, 1) else (1, 1))
        assert relative_error(conv.weight, theirs.weight) <= 1e-12
        assert relative_error(conv.bias, theirs.bias) <= 1e-12

    check()


@every_family
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_deployed_block_has_no_branches_left(family: str, data: st.DataObject) -> None:
    block = data.draw(with_hard_norms(FAMILIES[family]))
    assert len(branches_of(block).branches) >= 1
    deploy(block)
    assert branches_of(block) is None
    merged, records = merge_branches(nn.Sequential(block))
    assert records == [] and type(merged[0]) is type(block)


@every_family
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_merge_branches_replaces_each_block_and_measures_it(family: str, data: st.DataObject) -> None:
    block = data.draw(with_hard_norms(FAMILIES[family]))
    model = nn.Sequential(block)
    merged, (record,) = merge_branches(model)
    assert record.merged and record.reason == ""
    assert record.branches == len(branches_of(block).branches)
    assert record.max_rel_error <= 1e-4
    assert isinstance(merged[0], MergedBlock) and model[0] is block


def test_squeeze_excite_is_kept_where_the_hosts_switch_drops_it() -> None:
    torch.manual_seed(0)
    block = MMPretrainRepVGGBlock(4, 4, se_cfg=dict(ratio=2)).eval()
    set_norms(block, seed=0, low=-1, high=1, mean=1)
    x = random_input(4).float()
    wanted = block(x)
    merged, _ = merge_branches(block)
    assert block.se_layer is not None
    assert relative_error(merged(x), wanted) <= 1e-5
    theirs = copy.deepcopy(block)
    theirs.switch_to_deploy()
    assert relative_error(theirs(x), wanted) > 1e-2


def test_alpha_of_zero_counts_as_one_like_in_the_block_itself() -> None:
    torch.manual_seed(0)
    block = MMYoloRepVGGBlock(4, 4, use_alpha=True).eval()
    nn.init.zeros_(block.alpha)
    x = random_input(4).float()
    assert relative_error(merge_branches(block)[0](x), block(x)) <= 1e-5


def test_synchronised_norms_merge_like_others() -> None:
    torch.manual_seed(0)
    block = MMYoloRepVGGBlock(4, 4, norm_cfg=dict(type="SyncBN")).eval()
    set_norms(block, seed=1, low=-2, high=2, mean=2)
    assert isinstance(block.rbr_identity, nn.SyncBatchNorm)
    x = random_input(4).float()
    assert relative_error(merge_branches(block)[0](x), block(x)) <= 1e-5


def test_branch_with_group_norm_is_left_alone_with_a_reason() -> None:
    block = MMYoloRepVGGBlock(4, 4, norm_cfg=dict(type="GN", num_groups=2))
    merged, (record,) = merge_branches(nn.Sequential(block))
    assert type(merged[0]) is MMYoloRepVGGBlock
    assert not record.merged and "GroupNorm" in record.reason


def small_networks() -> dict[str, nn.Module]:
    stage = dict(num_blocks=[1, 2, 1, 1], width_factor=[0.25, 0.25, 0.25, 0.25])
    repvgg = dict(stage, group_layer_map={2: 2}, se_cfg=dict(ratio=4), stem_channels=16)
    mobileone = dict(stage, num_conv_branches=[2, 1, 1, 3], num_se_blocks=[0, 0, 1, 0])
    large = dict(large_kernel_sizes=[9, 7, 5, 5], layers=[1, 1, 2, 1], channels=[8] * 4, small_kernel=3, dw_ratio=1)
    affine = dict(layers=[1, 1, 2, 1], embed_dims=[8] * 4, mlp_ratios=[2] * 4, layer_scale_init_value=0.5)
    return {
        "RepLKNet": RepLKNet(large),
        "RIFormer": RIFormer(affine, out_indices=[0, 2, 4, 6]),
        "RepVGG": RepVGG(repvgg),
        "MobileOne": MobileOne(mobileone),
        "PP-YOLOE": nn.Sequential(nn.Conv2d(3, 8, 1), PPYOLOEBasicBlock(8, 8, use_alpha=True)),
        "YOLOv6": nn.Sequential(nn.Conv2d(3, 8, 1), RepStageBlock(8, 8, num_blocks=3)),
    }


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("RepVGG", 6), ("MobileOne", 11), ("PP-YOLOE", 1), ("YOLOv6", 3), ("RepLKNet", 5), ("RIFormer", 5)],
)
def test_every_block_of_a_network_is_merged(name: str, blocks: int) -> None:
    torch.manual_seed(0)
    model = small_networks()[name]
    model.eval()  # the toolboxes' own eval returns nothing
    set_norms(model, seed=0, low=-1, high=1, mean=1)
    model.double()
    merged, records = merge_branches(model)
    assert sum(record.merged for record in records) == len(records) == blocks
    x = random_input(3, size=(64, 64))
    with torch.no_grad():
        pairs = zip(merged(x), model(x), strict=True)
        assert max(relative_error(actual, wanted) for actual, wanted in pairs) <= 1e-12
