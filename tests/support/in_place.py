"""Networks that work in place, each with a twin that computes the same out of place."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Net(nn.Module):
    """Works in place where it is told to, somewhere that ``where`` names."""

    def __init__(self, where: str, in_place: bool) -> None:
        super().__init__()
        self.where, self.in_place = where, in_place
        self.stem, self.one, self.other = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 8), (8, 8), (8, 8)))
        self.head = nn.Conv2d(8, 4, 1)

    def normalized(self, x: Tensor) -> Tensor:
        if self.where == "input":
            return x.sub_(0.5).div_(0.2) if self.in_place else (x - 0.5) / 0.2
        if self.where == "slice of the input":
            if not self.in_place:
                return torch.cat([x[:, :1] - 0.5, x[:, 1:]], 1)
            x[:, :1].sub_(0.5)
        if self.where == "input by out=":
            return torch.mul(x, 2.0, out=x) if self.in_place else x * 2.0
        return x

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(self.normalized(x))
        if self.where == "slice of a value":
            if self.in_place:
                y[:, :4].relu_()
            else:
                y = torch.cat([y[:, :4].relu(), y[:, 4:]], 1)
        elif self.where == "value by out=":
            y = torch.clamp(y, 0, 6, out=y) if self.in_place else y.clamp(0, 6)
        elif self.where == "behind a layer":
            y = functional.silu(y, inplace=self.in_place)
        else:
            y = y.relu_() if self.in_place else y.relu()
        u = self.one(y)
        if self.where == "value, once it was read":
            y = y.mul_(0.5) if self.in_place else y * 0.5
        return self.head((u.relu() + self.other(y)).relu())


PLACES = (
    *("input", "slice of the input", "input by out=", "behind a layer", "value that is read twice"),
    *("slice of a value", "value, once it was read"),
)
"""Where a `Net` works in place and can be calibrated all the same."""
