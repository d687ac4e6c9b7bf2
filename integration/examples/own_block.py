"""A block family of one's own: say which modules form each branch and what follows their sum."""

import torch
from torch import nn

from repapq_plugin import Branch, BranchSpec, RepAPQConfig, quantize_model, register_branches


class MyBlock(nn.Module):
    """3x3 + 1x1 + normalised shortcut, then an activation."""

    def __init__(self, width):
        super().__init__()
        self.conv3, self.bn3 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv1, self.bn1 = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)
        self.bn_identity = nn.BatchNorm2d(width)
        self.activation = nn.ReLU()

    def forward(self, x):
        return self.activation(self.bn3(self.conv3(x)) + self.bn1(self.conv1(x)) + self.bn_identity(x))


register_branches(
    MyBlock,
    lambda block: BranchSpec(
        branches=(Branch((block.conv3, block.bn3)), Branch((block.conv1, block.bn1)), Branch((block.bn_identity,))),
        after=(block.activation,),
    ),
)

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), MyBlock(8), MyBlock(8)).eval()
result = quantize_model(model, [torch.randn(8, 3, 16, 16)] * 2, RepAPQConfig.from_preset("w6a6", steps=5))
for record in result.merges:
    print(f"{record.name}: relative error of the merge {record.max_rel_error:.1e}")
