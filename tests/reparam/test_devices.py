"""Whatever is made to merge a block is made where the block is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from repapq_plugin.reparam import QARepVGGBlock, fold_batchnorm, merge_branches
from repapq_plugin.reparam.linear_map import identity_map, in_parallel, in_series, scaled, to_conv
from repapq_plugin.reparam.norms import norm_affine
from tests.support.devices import MovedAway
from tests.support.numerics import set_norms


class Block(nn.Module):
    """Branches without parameters beside one with some, factors and a shift."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.idle = nn.Conv2d(4, 4, 3, padding=1), nn.AvgPool2d(3, 1, 1), nn.Identity()
        self.scale = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.scale * self.conv(x) + self.pool(x) * 0.5 + self.idle(x))


class Untraceable(Block):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + (self.one(x) if bool(x.sum() < 1e30) else self.pool(x))


class Asymmetric(nn.Module):
    """Layers in series, a tap that is read alone, groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, (1, 3), padding=(0, 1), bias=False), nn.Conv2d(8, 4, 1, groups=2)
        self.other, self.norm = nn.Conv2d(4, 4, (3, 1), padding=(1, 0)), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + self.norm(self.other(x))


def timm_model(name: str, **keys: tuple[int, ...]) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=2, **keys)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "taught": lambda: timm.models.byobnet.MobileOneBlock(4, 4, 3),
    "QARepVGG": lambda: QARepVGGBlock(4, 4),
    "without parameters": Block,
    "untraceable": Untraceable,
    "in series": Asymmetric,
    "FastViT": timm_model("fastvit_t8", layers=(1, 1, 1, 1)),
    "RepViT": timm_model("repvit_m0_9", depth=(2, 2, 2, 2)),
}
SLOW = {"FastViT"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in BLOCKS])
def test_a_block_is_merged_where_it_is(name: str) -> None:
    torch.manual_seed(0)
    model = BLOCKS[name]().eval()
    set_norms(model, seed=0, low=-1, high=1, mean=1)
    elsewhere = MovedAway(model)
    with elsewhere:
        merged, records = merge_branches(model, inplace=True)
        assert records and all(record.merged for record in records)
        assert all(elsewhere.is_there(tensor) for tensor in merged.parameters())


def test_a_layer_and_its_norm_may_be_on_two_devices() -> None:
    conv, norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4).eval()
    elsewhere = MovedAway(conv)
    with elsewhere:
        folded = fold_batchnorm(conv, norm)
        assert all(elsewhere.is_there(tensor) for tensor in folded.parameters())


def test_maps_of_two_devices_meet_where_the_first_is() -> None:
    conv, other = nn.Conv2d(4, 4, 1).double(), nn.Conv2d(4, 4, 1).double()
    elsewhere = MovedAway(conv)
    with elsewhere:
        one, two = identity_map(4, conv.weight), identity_map(4, other.weight)
        factor = torch.full((4,), 2.0, dtype=torch.float64)
        for linear in (in_series(one, two, "here"), in_parallel([one, two], "here"), scaled(one, factor, factor)):
            made = to_conv(linear, torch.float32)
            assert all(elsewhere.is_there(tensor) for tensor in made.parameters())


def test_a_norm_is_run_where_it_is() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    norm = Own(4).eval()
    elsewhere = MovedAway(norm)
    with elsewhere:
        assert all(elsewhere.is_there(value) for value in norm_affine(norm))


def test_the_pretended_device_tells_right_from_wrong() -> None:
    conv = nn.Conv2d(4, 4, 1)
    with MovedAway(conv) as _, pytest.raises(RuntimeError, match="on the same device"):
        conv(torch.ones(1, 4, 2, 2))
    with MovedAway(conv):
        conv(torch.ones(1, 4, 2, 2).to(conv.weight))
        conv(torch.ones(1, 4, 2, 2, device=conv.weight.device))
        with pytest.raises(RuntimeError, match="on the same device"):
            conv.weight * torch.ones(4, 1, 1, 1)
