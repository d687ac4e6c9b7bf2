"""QARepVGG's block, which neither OpenMMLab nor timm ships.

Source: arXiv:2212.01593. RepVGG's block with the norms of the 1x1 and of the identity branch left
out, whose variances are what makes the merged kernel hard to quantize, and one norm behind the sum
in their place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn


class QARepVGGBlock(nn.Module):
    """``act(norm(norm(conv3x3(x)) + conv1x1(x) [+ x]))``.

    The identity branch is there where input and output have the same shape. Trains with its branches;
    `merge_branches` makes it one 3x3 convolution and the activation.

    Args:
        in_channels: Channels read.
        out_channels: Channels given.
        stride: Of both convolutions.
        dilation: Spacing of the 3x3 kernel's taps.
        groups: Channel groups of both convolutions.
        act: Makes the activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        act: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.conv3x3 = nn.Conv2d(in_channels, out_channels, 3, stride, dilation, dilation, groups, bias=False)
        self.norm3x3 = nn.BatchNorm2d(out_channels)
        self.conv1x1 = nn.Conv2d(in_channels, out_channels, 1, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.act = act()
        self.adds_input = in_channels == out_channels and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, in_channels, height, width]`` to ``[batch, out_channels, height', width']``."""
        total = self.norm3x3(self.conv3x3(x)) + self.conv1x1(x)
        return cast(Tensor, self.act(self.norm(total + x if self.adds_input else total)))
