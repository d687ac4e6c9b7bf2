"""Where the learned scalars of concatenated branches stand, found from how a network is put together."""

import pytest
import torch
import torchvision
from torch import Tensor, nn

from repapq_plugin.mimicnorm import convert

CONCATENATED = {"concatenated": True}


class ConvNorm(nn.Sequential):
    """A convolution, its norm and a ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, groups: int = 1, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()


class Classifier(nn.Module):
    """A body and a linear layer behind an average."""

    def __init__(self, *body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.last = nn.Sequential(*body), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x).mean((2, 3)))


class Dense(nn.Module):
    """What came in, beside what one more branch makes of it."""

    def __init__(self, inputs: int, growth: int, names: tuple[str, ...] = ("a", "b")) -> None:
        super().__init__()
        for i, name in enumerate(names):
            setattr(self, name, ConvNorm(inputs if i == 0 else growth, growth, 3 if i else 1))
        self.names = names

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for name in self.names:
            y = getattr(self, name)(y)
        return torch.cat([x, y], 1)


class Inception(nn.Module):
    """Four branches: one layer, two, three behind a split of their own, and a pooling with a layer."""

    def __init__(self, width: int, act: bool = True) -> None:
        super().__init__()
        self.one = ConvNorm(width, 4, act=act)
        self.two = nn.Sequential(ConvNorm(width, 4), ConvNorm(4, 4, 3, act=act))
        self.three = nn.Sequential(ConvNorm(width, 4), ConvNorm(4, 4, 3), ConvNorm(4, 4, 3, act=act))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), ConvNorm(width, 4, act=act))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.one(x), self.two(x), self.three(x), self.pooled(x)), dim=1)


class Aggregated(nn.Module):
    """Every layer's output is concatenated, and read by the next layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.c = (ConvNorm(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(a)
        return torch.cat([a, b, self.c(b)], 1)


class Pyramid(nn.Module):
    """A deep map, resized, beside a shallow one."""

    def __init__(self) -> None:
        super().__init__()
        self.shallow = ConvNorm(8, 8)
        self.deep = nn.Sequential(*(ConvNorm(8, 8, 3) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.shallow(x)
        deep = nn.functional.interpolate(self.deep(nn.functional.max_pool2d(x, 2)), scale_factor=2)
        return torch.cat([deep, x], 1)


def starts(model: nn.Module, *, recipe: object = CONCATENATED, size: int = 16) -> dict[str, float]:
    example = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return dict(convert(model, example, recipe=recipe).residual)


def test_shufflenets_branches_start_as_in_the_authors_code() -> None:
    model = torchvision.models.ShuffleNetV2([1, 2, 1], [8, 16, 32, 64, 64], num_classes=10)
    found = starts(model, size=64)
    wanted = {"conv5.1": 1.2}
    for stage, units in ((2, 1), (3, 2), (4, 1)):
        wanted[f"stage{stage}.0.branch1.3"] = 1.2
        wanted |= {f"stage{stage}.{unit}.branch2.6": 1.44 for unit in range(units)}
    assert found == pytest.approx(wanted)
    assert starts(model, size=64, recipe="authors") == pytest.approx(wanted)
    assert starts(model, size=64, recipe="default") == {}


def test_features_that_are_used_again_are_a_shortcut() -> None:
    model = Classifier(ConvNorm(3, 8, 3), Dense(8, 4), Dense(12, 4), width=16)
    assert starts(model) == pytest.approx({"body.1.b.norm": 1.44, "body.2.b.norm": 1.44})


def test_norms_in_front_of_layers_end_no_branch() -> None:
    model = torchvision.models.DenseNet(8, (2, 2), 8, num_classes=10)
    assert starts(model, size=32) == {}


@pytest.mark.parametrize("act", [True, False])
def test_each_branch_of_an_inception_counts_its_layers(act: bool) -> None:
    model = Classifier(ConvNorm(3, 8, 3), Inception(8, act), Inception(16, act), ConvNorm(16, 8), width=8)
    wanted = {}
    for block in (1, 2):
        wanted |= {f"body.{block}.one.norm": 1.2, f"body.{block}.two.1.norm": 1.44}
        wanted |= {f"body.{block}.three.2.norm": 1.728, f"body.{block}.pooled.1.norm": 1.2}
    assert starts(model) == pytest.approx(wanted | {"body.3.norm": 1.2})


def test_a_branch_that_goes_on_into_another_has_none() -> None:
    model = Classifier(ConvNorm(3, 8, 3), Aggregated(8), width=24)
    # All three share the first layer.
    assert starts(model) == pytest.approx({"body.1.c.norm": 1.44})


def test_a_shallow_map_beside_a_deep_one_is_its_shortcut() -> None:
    model = Classifier(ConvNorm(3, 8, 3), Pyramid(), ConvNorm(16, 8), width=8)
    assert starts(model) == pytest.approx({"body.1.deep.2.norm": 1.728, "body.2.norm": 1.2})


def test_depthwise_layers_do_not_count() -> None:
    model = Classifier(ConvNorm(3, 8, 3), Dense(8, 8), width=16)
    model.body[1].b = ConvNorm(8, 8, 3, groups=8)
    assert starts(model) == pytest.approx({"body.1.b.norm": 1.2})


class Residual(nn.Module):
    """A sum, whose branch is a concatenation of two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = ConvNorm(8, 4), ConvNorm(8, 4)
        self.end = ConvNorm(8, 8, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.end(torch.cat([self.a(x), self.b(x)], 1))


def test_sums_have_their_scalars_beside_those_of_concatenations() -> None:
    model = Classifier(ConvNorm(3, 8, 3), Residual(), Residual(), width=8)
    branches = {f"body.{block}.{name}.norm": 1.2 for block in (1, 2) for name in ("a", "b")}
    ends = {"body.1.end.norm": 1.44, "body.2.end.norm": 0.72}
    assert starts(model) == pytest.approx(branches | ends)
    assert starts(model, recipe="default") == pytest.approx(ends)


class Stacked(nn.Module):
    """Maps joined along their height: one map's channels, not more of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = ConvNorm(8, 8), ConvNorm(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], 2)


def test_only_channels_are_branches() -> None:
    assert starts(Classifier(ConvNorm(3, 8, 3), Stacked(), width=8)) == {}
