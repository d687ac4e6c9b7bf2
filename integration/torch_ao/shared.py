"""What tests of torch.ao and of pt2e have in common: configurations, and a network that cannot be traced."""

from __future__ import annotations

from torch import Tensor, nn

from repapq_plugin import RepAPQConfig
from tests.support.networks import Chain

CONFIG = RepAPQConfig(steps=0, activation_observer="min_max", weight_observer="min_max", equalize=False)


class Fickle(nn.Module):
    """Its Python depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = Chain()

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x) if x.mean() > -9 else -self.chain(x)


QUICK = {"steps": 0, "activation_observer": "min_max", "weight_observer": "min_max", "equalize": False}
POLICIES = {
    "plain": {},
    "one width": {"first_last_bits": None},
    "special": {"layer_bits": {"stages.2.*": (6, 5)}},
    "the last pattern wins": {"layer_bits": {"stages.*": (6, 5), "stages.1.*": (3, 7), "stages.1.1*": (5, 6)}},
    "special at an end": {"layer_bits": {"fc": (7, 6), "stem*": (5, 5)}},
    "a module stays float": {"keep_float": ("stages.1",)},
    "float before special": {"keep_float": ("stages.?.1", "fc"), "layer_bits": {"stages.*": (6, 5), "fc": (6, 6)}},
    "float before special, alike": {"keep_float": ("stages.0.*",), "layer_bits": {"stages.0.*": (2, 2)}},
    "reduced": {"weight_bits": 8, "reduce_range": True, "layer_bits": {"stages.0.*": (8, 8), "stages.1.*": (4, 4)}},
}  # fmt: skip
"""Keys of configurations of 4 bits."""


def policy(name: str) -> RepAPQConfig:
    return RepAPQConfig.from_preset("w4a4", **QUICK).replace(**POLICIES[name])
