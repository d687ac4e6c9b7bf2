"""Small networks with the difficulties of real ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repapq_plugin import Branch, BranchSpec, register_branches


class TwoBranchBlock(nn.Module):
    """3x3 + 1x1 (+ identity), each with a norm, then ReLU: RepVGG's block."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.large = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))
        self.small = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        total = self.large(x) + self.small(x)
        return self.act(total if self.identity is None else total + self.identity(x))


@register_branches(TwoBranchBlock)
def _(block: TwoBranchBlock) -> BranchSpec:
    identity = () if block.identity is None else (Branch((block.identity,)),)
    return BranchSpec((Branch((*block.large,)), Branch((*block.small,)), *identity), after=(block.act,))


class UntaughtBlock(TwoBranchBlock):
    """The same under a name of its own; see the test that asks for a warning."""


class Chain(nn.Module):
    """A stem, stages of blocks, pooling and a classifier."""

    def __init__(self, widths: tuple[int, ...] = (8, 12, 16), depth: int = 2, inputs: int = 3) -> None:
        super().__init__()
        self.stem = TwoBranchBlock(inputs, widths[0], 2)
        stages, last = [], widths[0]
        for width in widths:
            blocks = [TwoBranchBlock(last, width, 1 if width == last else 2)]
            blocks += [TwoBranchBlock(width, width) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
            last = width
        self.stages = nn.ModuleList(stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.fc(self.pool(x).flatten(1))


class Pyramid(nn.Module):
    """A backbone of two levels, Python glue between them, a head shared by both, a tuple of outputs."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1 = nn.Sequential(TwoBranchBlock(3, width, 2), TwoBranchBlock(width, width))
        self.down2 = nn.Sequential(TwoBranchBlock(width, width, 2), TwoBranchBlock(width, width))
        self.up = nn.ConvTranspose2d(width, width, 2, 2)
        self.lateral = nn.Sequential(
            nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.SiLU(inplace=True)
        )
        self.tower = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True))
        self.classes = nn.Conv2d(width, 4, 1)
        self.boxes = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        fine = self.down1(x)
        coarse = self.down2(fine)
        fine = self.lateral(fine)
        fine += self.up(coarse)
        towers = [self.tower(level) for level in (fine, coarse)]
        return [self.classes(t) for t in towers], [self.boxes(t) for t in towers]


class Tied(nn.Module):
    """Two levels, one weight for the heads of both; each head has a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.fine, self.coarse = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.out = nn.Conv2d(8, 4, 1)
        self.coarse.weight = self.fine.weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x).relu()
        return self.out(self.fine(x).relu()), self.coarse(3 * self.down(x).relu())


def settle(model: nn.Module, size: int = 16) -> nn.Module:
    """Give norms statistics of their own by a few passes in training mode; returned in eval mode."""
    model.train()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(16, 3, size, size))
    return model.eval()


def batches(count: int = 4, size: int = 16) -> list[Tensor]:
    """Return calibration batches of 8 images."""
    return [torch.randn(8, 3, size, size) for _ in range(count)]


class Fragile(nn.Module):
    """Runs inside its network, but not a second time on other data of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(TwoBranchBlock(8, 8), TwoBranchBlock(8, 8))
        self.allowed = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.allowed:
            raise KeyError("context")
        return self.blocks(x)
