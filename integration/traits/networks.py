"""Small networks, each with one trait that real ones have and quantization tools stumble over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from integration.traits.parallel import replicated, sharded, sharded_in_place
from tests.support.own_layers import Padded, Scaled, Standardized, Twice

IMAGE = (3, 16, 16)
"""What a network takes, without the batch."""

Layer = Callable[..., nn.Module]


class Row(nn.Module):
    """Layers in a row, inside a module."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def around(*middle: nn.Module) -> Row:
    """Two layers between a stem and a head, with norms to fold."""
    stem = (nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    return Row(*stem, *middle, nn.ReLU(), nn.Conv2d(8, 4, 1))


def with_layers(layer: Layer) -> Row:
    """The same with layers that a function makes."""
    return Row(layer(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), layer(8, 8, 3, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))


class ByKeyword(nn.Module):
    """Calls its layers by the names of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Linear(8 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(input=self.act(self.stem(input=x)).flatten(1))


class Shared(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.other = nn.Conv2d(3, 8, 3, 2, 1), *(nn.Conv2d(8, 8, 3, 1, 1) for _ in range(2))
        self.other.weight = self.one.weight
        self.head, self.act = nn.Conv2d(8, 4, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.other(self.act(self.one(self.act(self.stem(x)))))))


@dataclass
class Output:
    """What a network may return."""

    logits: Tensor
    features: Tensor


class ToDataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Output:
        features = self.stem(x).relu()
        return Output(self.head(features), features)


class InPlace(nn.Module):
    """Normalizes what it is given in place."""

    def __init__(self) -> None:
        super().__init__()
        self.body = around(nn.Conv2d(8, 8, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.sub_(0.5).div_(0.5))


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.one, self.other = nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 4, 4, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(self.stem(x).relu().flatten(2)).relu())


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 4, (1, 4, 4), padding="same"))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x[:, None])


class UpTo(nn.Module):
    """A transposed convolution that is told the size of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 8, 3, 2, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.down(x).relu(), output_size=x.shape[-2:]).relu())


class LinearNorm(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return self.norm(x.flatten(0, 1)).reshape_as(x)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.fc = nn.Conv2d(3, 8, 4, 4), LinearNorm(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mix(self.stem(x).flatten(2).transpose(1, 2)).relu().mean(1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.encoder, self.fc = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


class ByFunction(nn.Module):
    """Uses the weight of one layer, and one of its own, through functions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.used, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 4, 1)
        self.own = nn.Parameter(torch.randn(8, 8, 1, 1) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv2d(self.stem(x).relu(), self.used.weight * 0.5, self.used.bias, padding=1).relu()
        return self.head(functional.conv2d(x, self.own).relu())


class Parsed(nn.Module):
    """Walks a list of layers, and reads of each where it takes its input from, as parsed networks do."""

    def __init__(self) -> None:
        super().__init__()
        layers = [(-1, nn.Conv2d(3, 8, 3, 2, 1)), (1, nn.ReLU()), (2, nn.Conv2d(8, 8, 3, 1, 1)), (-1, nn.ReLU())]
        layers += [(4, nn.Conv2d(8, 4, 1))]
        for index, (source, layer) in enumerate(layers):
            layer.f, layer.i = source, index
        self.model = nn.ModuleList(layer for _, layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        made = [x]
        for layer in self.model:
            made.append(layer(made[layer.f]))
            assert layer.i == len(made) - 2
        return made[-1]


class Kind(nn.Conv2d):
    """A class of its own with torch's forward."""


def hooked() -> nn.Module:
    """A layer whose output a hook changes."""
    model = around(nn.Conv2d(8, 8, 3, 1, 1))
    model.body[3].register_forward_hook(lambda _, args, output: output * 0.5)
    return model


def hooked_norm() -> nn.Module:
    """Weight norm by hooks, which has run once."""
    model = Row(nn.utils.weight_norm(nn.Conv2d(3, 8, 3, 2, 1)), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    model(torch.randn(1, *IMAGE))
    return model


class Inner(nn.Module):
    """A part of its own between stem and head."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.stem, self.part, self.head = nn.Conv2d(3, 8, 3, 2, 1), part, nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(self.stem(x).relu()))


def inner(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A part that something wraps."""
    return Inner(wrap(nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())))


class Called(Inner):
    """Calls one layer twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(self.part(self.stem(x).relu()).relu()).relu())


class InferenceInside(Inner):
    """Runs a part in inference mode."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            y = self.part(self.stem(x).relu())
        return self.head(y.clone())


class Keeps(Inner):
    """Keeps what it computed, with its graph."""

    kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.part(self.stem(x).relu()).relu()
        return self.head(self.kept)


class Levels(NamedTuple):
    fine: Tensor
    coarse: list[Tensor]


class Nested(Inner):
    """Returns containers in containers."""

    def forward(self, x: Tensor) -> dict[str, Levels]:
        y = self.stem(x).relu()
        return {"levels": Levels(self.head(y), [self.head(self.part(y).relu())])}


class OwnNorm(nn.Module):
    """A batch norm at inference whose epsilon is no attribute."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels) * 0.1)
        self.register_buffer("running_mean", torch.randn(channels) * 0.1)
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight / (self.running_var + 1e-3).sqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


def by_buffer() -> nn.Module:
    """A layer whose weight does not learn: a buffer."""
    model = around(nn.Conv2d(8, 8, 3, 1, 1))
    weight = model.body[3]._parameters.pop("weight")
    model.body[3].register_buffer("weight", weight.detach())
    return model


def padded_by(**keys: object) -> nn.Module:
    make: Layer = nn.Conv2d
    return around(make(8, 8, **keys))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: around(nn.Conv2d(8, 8, 3, 1, 1)),
    "keyword call": ByKeyword,
    "padding 'same'": lambda: padded_by(kernel_size=3, padding="same", dilation=2),
    "padding 'same', even": lambda: padded_by(kernel_size=4, padding="same"),
    "padding 'valid'": lambda: padded_by(kernel_size=3, padding="valid"),
    "reflect padding": lambda: padded_by(kernel_size=3, padding=1, padding_mode="reflect"),
    "circular padding": lambda: padded_by(kernel_size=3, padding=(0, 1), padding_mode="circular"),
    "replicate padding": lambda: padded_by(kernel_size=3, padding=1, padding_mode="replicate", groups=8),
    "SAME subclass": lambda: with_layers(Padded),
    "standardized weight": lambda: with_layers(Standardized),
    "weight of one scale": lambda: with_layers(Scaled),
    "weight norm, hook": hooked_norm,
    "weight norm, parametrized": lambda: around(nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, 1, 1))),
    "tied weights": Shared,
    "dataclass output": ToDataclass,
    "in-place input": InPlace,
    "bfloat16": lambda: around(nn.Conv2d(8, 8, 3, 1, 1)).bfloat16(),
    "float16": lambda: around(nn.Conv2d(8, 8, 3, 1, 1)).half(),
    "Conv1d": Sequence,
    "Conv3d": Volume,
    "transposed to a size": UpTo,
    "tokens with a norm": Tokens,
    "encoder": Encoder,
    "function": ByFunction,
    "parsed list": Parsed,
    "plain subclass": lambda: with_layers(Kind),
    "hook of its own": hooked,
    "compiled": lambda: torch.compile(around(nn.Conv2d(8, 8, 3, 1, 1)), backend="eager"),
    "compiled part": lambda: inner(lambda part: torch.compile(part, backend="eager")),
    "DataParallel": lambda: nn.DataParallel(around(nn.Conv2d(8, 8, 3, 1, 1))),
    "DataParallel part": lambda: inner(nn.DataParallel),
    "DDP": lambda: replicated(around(nn.Conv2d(8, 8, 3, 1, 1))),
    "DDP part": lambda: inner(replicated),
    "FSDP": lambda: sharded(around(nn.Conv2d(8, 8, 3, 1, 1))),
    "fully_shard part": lambda: inner(sharded_in_place),
    "scripted part": lambda: inner(torch.jit.script),
    "lazy layer": lambda: around(nn.LazyConv2d(8, 3, 1, 1)),
    "inference mode inside": lambda: InferenceInside(nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())),
    "graph kept": lambda: Keeps(nn.Conv2d(8, 8, 3, 1, 1)),
    "nested output": lambda: Nested(nn.Conv2d(8, 8, 3, 1, 1)),
    "called twice": lambda: Called(nn.Conv2d(8, 8, 3, 1, 1)),
    "norm without eps": lambda: around(nn.Conv2d(8, 8, 3, 1, 1), OwnNorm(8)),
    "group norm": lambda: around(nn.Conv2d(8, 8, 3, 1, 1), nn.GroupNorm(2, 8)),
    "weight as a buffer": by_buffer,
    "spectral norm, hook": lambda: around(nn.utils.spectral_norm(nn.Conv2d(8, 8, 3, 1, 1))),
    "spectral norm, parametrized": lambda: around(nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, 1, 1))),
    "double": lambda: around(nn.Conv2d(8, 8, 3, 1, 1)).double(),
    "two products": lambda: around(Twice(8, 8, 3, 1, 1)),
}
"""Makers of networks by the name of their trait; each takes images of `IMAGE`."""


def settled(name: str) -> nn.Module:
    """Return a network of `NETWORKS`, its norms with statistics of their own, in evaluation mode."""
    torch.manual_seed(sum(map(ord, name)))
    model = NETWORKS[name]()
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        for _ in range(4):
            model.float().train()(torch.randn(8, *IMAGE))
    return model.to(dtype).eval()
