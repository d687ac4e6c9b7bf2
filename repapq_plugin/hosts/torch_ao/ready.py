"""A quantizer that is ready, in the form in which torch.ao asks for a new one."""

from __future__ import annotations

import copy

from torch import nn


class Ready:
    """Answers a call, whatever its keywords, with a copy of one finished quantizer.

    Stands in a ``QConfig`` where a class with arguments usually does. torch.ao calls it once per
    place, sometimes with keywords for a fresh observer, which a finished quantizer has no use for.
    """

    def __init__(self, quantizer: nn.Module) -> None:
        self.quantizer = quantizer

    def __call__(self, **_: object) -> nn.Module:
        """Return a copy, which stays what it is in training mode too."""
        return copy.deepcopy(self.quantizer)

    def with_args(self, **_: object) -> Ready:
        """Return itself: nothing about a finished quantizer is left to say."""
        return self
