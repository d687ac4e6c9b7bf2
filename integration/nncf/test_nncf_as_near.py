"""Networks with ways of their own end as near to the float network as NNCF's own `quantize` brings them, or nearer."""

from __future__ import annotations

from collections.abc import Callable

import nncf
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from repapq_plugin import RepAPQConfig
from repapq_plugin.hosts.nncf import quantize
from tests.support.own_layers import Padded, Standardized

AS_NEAR = 3.0
"""By how many decibels ours may be behind: as much as another choice of ranges moves small networks."""


class Row(nn.Module):
    """Layers in a row, inside a module."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Shared(nn.Module):
    """Two layers of one weight, whose inputs differ in size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.other = nn.Conv2d(3, 16, 3, 2, 1), *(nn.Conv2d(16, 16, 3, 1, 1) for _ in range(2))
        self.out = nn.Conv2d(16, 8, 1)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.other(self.one(self.stem(x).relu()).relu() * 2).relu())


class Normalizing(Row):
    """Normalizes what it is given in place."""

    def __init__(self) -> None:
        layers = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1)
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.sub_(0.5).div_(0.2))


class Asking(nn.Module):
    """Asks its layers how large they are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 16, 3, 2), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        side = self.conv.kernel_size[0] // 2
        means = self.conv(functional.pad(x, (side,) * 4)).relu().mean((2, 3))
        return self.fc(means.reshape(-1, self.fc.in_features))


def with_layers(layer: Callable[..., nn.Module]) -> nn.Module:
    first, second = layer(3, 16, 3, 2), layer(16, 16, 3, 2)
    return Row(first, nn.BatchNorm2d(16), nn.ReLU(), second, nn.ReLU(), nn.Conv2d(16, 8, 1))


def hooked() -> nn.Module:
    """Weight norm by hooks, which has run once."""
    model = Row(nn.utils.weight_norm(nn.Conv2d(3, 16, 3, 2, 1)), nn.ReLU(), nn.Conv2d(16, 8, 1)).eval()
    with torch.no_grad():
        model(torch.randn(1, 3, 24, 24))
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "padding of its own": lambda: with_layers(Padded),
    "standardized weight": lambda: with_layers(Standardized),
    "one weight": Shared,
    "in place": Normalizing,
    "attributes": Asking,
}


def made() -> tuple[dict[str, nn.Module], list[Tensor]]:
    """Return all networks and the images, all from one seed."""
    torch.manual_seed(0)
    norm = hooked()
    images = [torch.randn(1, 3, 24, 24) for _ in range(16)]
    models = {name: make().eval() for name, make in NETWORKS.items()}
    return models | {"weight norm": norm}, images


def decibels(wanted: Tensor, got: Tensor) -> float:
    return float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum()))


@pytest.mark.parametrize("name", [*NETWORKS, "weight norm"])
def test_it_is_as_near_as_nncfs_own(name: str) -> None:
    models, images = made()
    model = models[name]

    def dataset() -> nncf.Dataset:
        return nncf.Dataset([image.clone() for image in images])

    with torch.no_grad():
        wanted = model(images[0].clone())
        theirs = decibels(wanted, nncf.quantize(model, dataset())(images[0].clone()))
        quantized = quantize(model, dataset(), repapq=RepAPQConfig(steps=10))
        ours = decibels(wanted, quantized(images[0].clone()))
    assert ours > theirs - AS_NEAR, f"{ours:.1f} dB, NNCF {theirs:.1f}"


@pytest.mark.parametrize("loss", ["mse", "mae"])
def test_ranges_are_judged_by_the_loss_that_is_learned(loss: str) -> None:
    """Absolute errors let a range cut off what is large and rare; in this network it costs six decibels."""
    models, images = made()
    model = models["in place"]
    with torch.no_grad():
        wanted = model(images[0].clone())
        data = nncf.Dataset([image.clone() for image in images])
        got = quantize(model, data, repapq=RepAPQConfig(steps=0, loss=loss))(images[0].clone())  # type: ignore[arg-type]
    assert (decibels(wanted, got) > 36) == (loss == "mse")
