"""Noticing blocks with parallel linear branches that nobody taught."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.models.fastvit import MobileOneBlock as FastViTBlock
from timm.models.repghost import RepGhostModule
from timm.models.repvit import RepVggDw
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from integration.reparam.reparam_blocks import TwoBranches, two_branches
from repapq_plugin.reparam import branches, find_unknown_multibranch, fold_conv_norm_pairs, merge_branches


def found_in(model: nn.Module) -> list[str]:
    return find_unknown_multibranch(model, lambda net: net(torch.randn(2, 4, 8, 8)))


class Writes(TwoBranches):
    """`TwoBranches` with its sum written in some other way."""

    def __init__(self, combine: Callable[[list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.combine([self.bn3(self.conv3(x)), self.bn1(self.conv1(x))]))


def add_in_place(terms: list[Tensor]) -> Tensor:
    total: Tensor | int = 0
    for term in terms:
        total += term
    return total


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


LEARNED = nn.Parameter(torch.ones(1))

UNKNOWN = {
    "norms and identity": TwoBranches(),
    "sum()": Writes(sum),
    "in place": Writes(add_in_place),
    "torch.add": Writes(lambda terms: torch.add(*terms)),
    "scaled": Writes(lambda terms: terms[0] + 0.5 * terms[1]),
    "learned scale": Writes(lambda terms: terms[0] - LEARNED * terms[1]),
    "norm branch": nn.Sequential(RepVggDw(4, 3)),
    "behind a convolution of its own": RepGhostModule(4, 4, relu=False),
    "foreign MobileOne": FastViTBlock(4, 4, 3, use_act=True),
}

PLAIN = {
    "residual with a projection": BasicBlock(
        4, 8, stride=2, downsample=nn.Sequential(nn.Conv2d(4, 8, 1, 2), nn.BatchNorm2d(8))
    ),
    "concatenated": Writes(lambda terms: torch.cat(terms, 1)),
    "activated branches": Writes(lambda terms: terms[0].relu() + terms[1].sigmoid()),
    "activated in place": Writes(lambda terms: torch.relu_(terms[0]) + torch.relu_(terms[1])),
    "one branch and the input": Writes(lambda terms: terms[0]),
    "multiplied": Writes(lambda terms: terms[0] * terms[1]),
    "residual around a unit without activation": nn.Sequential(Residual(nn.Conv2d(4, 4, 1))),
    "chain": nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_block_is_noticed_before_and_after_folding(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ModuleDict({"x": UNKNOWN[name]})["x"])
    wanted = ["1.0"] if name == "norm branch" else ["1"]
    assert found_in(model) == wanted
    x = torch.randn(2, 4, 8, 8)
    fold_conv_norm_pairs(model, lambda net: net(x))
    assert found_in(model) == wanted


@pytest.mark.parametrize("name", PLAIN)
def test_plain_module_is_not_taken_for_one(name: str) -> None:
    assert found_in(nn.Sequential(nn.Conv2d(4, 4, 1), PLAIN[name])) == []


def test_only_the_innermost_module_is_reported() -> None:
    assert found_in(nn.Sequential(Residual(nn.Sequential(Writes(sum), nn.Conv2d(4, 4, 1))))) == ["0.inner.0"]
    block = Writes(sum)
    block.act = nn.Identity()
    assert found_in(nn.Sequential(Residual(nn.Sequential(block, nn.Conv2d(4, 4, 1))))) == ["0.inner.0"]


def test_known_block_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(TwoBranches())
    assert found_in(model) == ["0"]
    monkeypatch.setattr(branches, "_BY_CLASS", {TwoBranches: two_branches})
    assert found_in(model) == []
    assert found_in(merge_branches(model)[0]) == []


def test_mode_and_hooks_are_as_before() -> None:
    model = nn.Sequential(TwoBranches()).train()
    found_in(model)
    assert all(module.training for module in model.modules())
    assert int(model[0].bn1.num_batches_tracked) == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
