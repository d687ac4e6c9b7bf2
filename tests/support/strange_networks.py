"""Small networks, each odd in a way of its own, and what runs them: what users write, and tools stumble over."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

SIZE = 12

Data = list[object]


@dataclass(frozen=True)
class Strange:
    """A network and its batches.

    Args:
        make: Builds the network; it is settled in training mode first, where that can be run.
        batch: Returns one batch of as many samples as it is told.
        forward: Runs it; default: `call_model`.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int], object] = lambda count: torch.randn(count, 3, SIZE, SIZE)
    forward: Callable[[nn.Module, Any], object] | None = None


def conv(inputs: int = 8, outputs: int = 8, kernel: int = 3, **keys: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **keys)


def chain(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(conv(3), nn.ReLU(), *middle, nn.ReLU(), conv(8, 4, 1))


class Body(nn.Module):
    """Stem, one layer, head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.head = conv(3), conv(), conv(8, 4, 1)

    def run(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.stem(x).relu()).relu())

    def forward(self, x: Tensor) -> object:
        return self.run(x)


class ReadsTwice(nn.Conv2d):
    """Reads its weight twice: once to multiply, once to know how large it is."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight, self.bias, padding=1) / (1 + self.weight.abs().amax())


class Normalized(nn.Conv2d):
    """Divides its input by the size of its weight first."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x / self.weight.norm(), self.weight, self.bias, padding=1)


class Borrows(Body):
    """Calls a layer and uses its weight in a function besides."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.mid(self.stem(x).relu())
        return self.head((y + functional.conv2d(y, self.mid.weight, padding=1)).relu())


class Transposed(nn.Module):
    """An embedding that comes back transposed: one weight as table of two layers, read as it is and turned."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.out = nn.Linear(6, 8), nn.Linear(8, 16), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.stem(x).relu()).relu()
        return self.out(functional.linear(y, self.down.weight.t()).relu())


class TransposedLayer(nn.Module):
    """Two layers of one memory: the weight of one is the other's, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.out = nn.Linear(6, 16), nn.Linear(16, 6), nn.Linear(6, 4)
        self.up.weight = nn.Parameter(self.down.weight.detach().t())

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.up(self.down(x).relu()).relu())


class Logged(nn.Parameter):
    """A parameter of a class of its own."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result.as_subclass(Tensor) if isinstance(result, cls) and not result.is_leaf else result


class OddParameter(Body):
    def __init__(self) -> None:
        super().__init__()
        self.mid.weight = Logged(self.mid.weight.detach())


class Counts(Body):
    """Changes buffers in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean.mul_(0.9).add_(0.1 * x.mean((0, 2, 3)))
        return self.run(x)


class DependsOnCalls(Body):
    """Computes otherwise in each call: a buffer drifts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 0.01
        return self.run(x) * (1 + self.seen)


class KeywordsOnly(Body):
    def forward(self, *, image: Tensor, scale: float = 1.0) -> Tensor:
        return self.run(image * scale)


class AnyKeywords(Body):
    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {name: self.run(value) for name, value in sorted(inputs.items())}


class Yields(Body):
    def forward(self, x: Tensor) -> Iterator[Tensor]:
        y = self.stem(x).relu()
        yield self.head(y)
        yield self.head(self.mid(y).relu())


class Found(NamedTuple):
    logits: Tensor
    hidden: Tensor | None


class ToNamed(Body):
    def forward(self, x: Tensor) -> Found:
        y = self.mid(self.stem(x).relu()).relu()
        return Found(self.head(y), y)


class ToNamedWithNone(Body):
    def forward(self, x: Tensor) -> Found:
        return Found(self.run(x), None)


class ToOrdered(Body):
    def forward(self, x: Tensor) -> OrderedDict[str, object]:
        y = self.stem(x).relu()
        return OrderedDict([("late", [self.head(self.mid(y).relu())]), ("early", (self.head(y), None)), ("name", "x")])


class WithIntegers(Body):
    """Returns scores, what they say, and a number."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        y = self.run(x)
        return y, y.argmax(1), len(x)


class WithEmpty(Body):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.run(x)
        return y, y[:, :0]


class Complex(Body):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.rfft2(self.mid(self.stem(x).relu()))
        return self.head(torch.fft.irfft2(y * (0.5 + 0.1j), s=x.shape[-2:]))


class ToComplex(Body):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft2(self.run(x))


class ComplexWeight(Body):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(8, SIZE, SIZE // 2 + 1, dtype=torch.complex64) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.rfft2(self.stem(x).relu()) * self.filter
        return self.head(self.mid(torch.fft.irfft2(y, s=x.shape[-2:])).relu())


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.out = nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 20)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.mix(self.table(ids)).relu())


class TiedWords(Words):
    """The last layer's weight is the table of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(8, 8), nn.Linear(8, 20)
        self.out.weight = self.table.weight


class Bytes(Body):
    """Takes images as bytes."""

    def forward(self, x: Tensor) -> Tensor:
        return self.run((x.float() - 128) / 64)


class Dictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"stem": conv(3), "a.b".replace(".", "_"): conv(), "head": conv(8, 4, 1)})
        self.gains = nn.ParameterList([nn.Parameter(torch.rand(8, 1, 1) + 0.5) for _ in range(2)])
        self.matrices = nn.ParameterDict({"mix": nn.Parameter(torch.randn(8, 8) * 0.3)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers["stem"](x).relu() * self.gains[0]
        y = torch.einsum("nchw,dc->ndhw", self.layers["a_b"](y), self.matrices["mix"])
        return self.layers["head"](y.relu() * self.gains[1])


class FromProperty(nn.Conv2d):
    """Keeps its weight under another name and makes it of that."""

    def __init__(self, *args: Any, **keys: Any) -> None:
        super().__init__(*args, **keys)
        raw = self._parameters.pop("weight")
        self.raw = raw

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.raw * 0.5

    @weight.setter
    def weight(self, value: Tensor) -> None:
        raise AttributeError("this weight is made of another")


class WithBuffer(Body):
    """The weight of one layer is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        weight = self.mid._parameters.pop("weight")
        assert weight is not None
        self.mid.register_buffer("weight", weight.detach())


class NormedBuffer(WithBuffer):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.mid(self.stem(x).relu())).relu())


class BufferedBias(Body):
    def __init__(self) -> None:
        super().__init__()
        bias = self.mid._parameters.pop("bias")
        assert bias is not None
        self.mid.register_buffer("bias", bias.detach())


def spread() -> nn.Module:
    """Weights that do not lie in one piece."""
    model = chain(conv(8, 8, 1), nn.ReLU(), conv())
    for layer in (model[2], model[4]):
        weight = cast(Tensor, layer.weight).detach()
        layer.weight = nn.Parameter(weight.transpose(0, 1).contiguous().transpose(0, 1))
    return model


class Asks(Body):
    """Looks for unknown attributes in a table of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = {"depth": 3}

    def __getattr__(self, name: str) -> Any:
        if name in ("affine", "layer", "steps_of"):
            return 7
        try:
            return super().__getattr__(name)
        except AttributeError:
            return self.__dict__["table"][name] if name in self.__dict__.get("table", {}) else None

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x) * self.depth


class AsksInside(nn.Conv2d):
    """A layer that answers whatever it is asked for."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("own_"):
                return None
            raise


def with_hooks() -> nn.Module:
    """Hooks that change what layers read and give, one of them with keywords."""
    model = chain(conv(), nn.ReLU(), conv())
    model[2].register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))
    model[4].register_forward_hook(lambda _, args, kwargs, output: output + 0.5 * args[0], with_kwargs=True)
    model.register_forward_hook(lambda _, args, output: output.tanh())
    return model


def hooked_norm() -> nn.Module:
    """A hook between a layer and its norm."""
    model = chain(conv(bias=False), nn.BatchNorm2d(8))
    model[2].register_forward_hook(lambda _, args, output: output.clamp(-1, 1))
    return model


class NormOfMany(nn.Module):
    """A batch norm behind a linear layer on three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc, self.norm, self.out = nn.Linear(6, 8), nn.Linear(8, 5), nn.BatchNorm1d(7), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.fc(self.stem(x).relu())).relu())


class NormOfManyAlike(nn.Module):
    """The same, with as many tokens as features: the norm's channels look like those of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc, self.norm, self.out = nn.Linear(6, 8), nn.Linear(8, 7), nn.BatchNorm1d(7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.fc(self.stem(x).relu())).relu())


class Trained(Body):
    """Drops values whatever mode it is in."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.dropout(self.mid(self.stem(x).relu()).relu(), 0.3, training=True))


def dropping() -> nn.Module:
    return chain(conv(), nn.Dropout(0.5), nn.Dropout2d(0.5), conv()).train()


class StaysInTraining(nn.Module):
    """Its norm refuses evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain(conv(bias=False), nn.BatchNorm2d(8))

    def train(self, mode: bool = True) -> StaysInTraining:
        super().train(mode)
        self.body[3].train()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Parallel(nn.Module):
    """A part of it is wrapped."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(3), nn.DataParallel(nn.Sequential(conv(), nn.ReLU())), conv(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x).relu()))


class CompiledPart(nn.Module):
    """A part of it is compiled, by a backend that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3), conv(8, 4, 1)
        self.body = torch.compile(nn.Sequential(conv(), nn.ReLU()), backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x).relu()))


class ScriptedPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv(3), conv(8, 4, 1)
        self.body = torch.jit.script(nn.Sequential(conv(), nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x).relu()))


class Checkpointed(Body):
    """Computes a part anew in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        part = lambda z: self.mid(z).relu()  # noqa: E731
        y = torch.utils.checkpoint.checkpoint(part, y, use_reentrant=False) if torch.is_grad_enabled() else part(y)
        return self.head(y)


class NoGradInside(Body):
    """A frozen backbone."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.mid(self.stem(x).relu()).relu()
        return self.head(y)


class InferenceInside(Body):
    """A backbone in inference mode."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            y = self.mid(self.stem(x).relu()).relu()
        return self.head(y.clone())


class Autocasts(Body):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.run(x).float()


class Detaches(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.stem(x).relu()).relu().detach())


class SkipsCalls(Body):
    """Calls the forwards of its layers past their hooks."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid.forward(self.stem(x).relu()).relu())


class ByClass(Body):
    """Calls a layer through its class."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.Conv2d.forward(self.mid, self.stem(x).relu()).relu())


class ByConvForward(Body):
    """Calls the part of a layer that multiplies."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        return self.head(self.mid._conv_forward(y, self.mid.weight, self.mid.bias).relu())


class SwapsData(Body):
    """Writes its weight in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", self.mid.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        self.mid.weight.data = self.kept * 2.0
        return self.run(x)


class Sums(nn.Module):
    """Layers of several inputs: a list of tensors, and a bilinear form."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.pair, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Bilinear(8, 8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.pair(self.a(x).relu(), self.b(x).relu()).relu())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.cell, self.out = nn.Linear(6, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(self.stem(x).relu())[0])


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(6, 8), nn.Linear(8, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.out(self.attention(y, y, y, need_weights=False)[0])


class Unbatched(nn.Module):
    """Takes one image without an axis for samples."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain(conv())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Loops(Body):
    """As many passes as its input says."""

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        y = self.stem(x).relu()
        for _ in range(int(times)):
            y = self.mid(y).relu()
        return self.head(y)


class OnCondition(Body):
    """Calls a layer only for what is loud."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        return self.head(self.mid(y).relu() if float(y.mean()) > 1e9 else y)


class Flat(nn.Module):
    """The network is one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)


class Half(Body):
    """Casts inside."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu().half().float()
        return self.head(self.mid(y).relu().double().float())


class LargeAndSmall(Body):
    """Returns tensors of very different size."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.mid(self.stem(x).relu()).relu()
        return self.head(y) * 1e4, self.head(y) * 1e-4


class PixelsApart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.head = conv(3, 16), nn.PixelShuffle(2), conv(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.stem(x)).relu())


class Upwards(nn.Module):
    """Transposed convolutions of one and three axes, which no runtime has kernels for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.signal = conv(3), nn.ConvTranspose1d(8, 8, 2, 2)
        self.volume, self.head = nn.ConvTranspose3d(2, 2, (1, 2, 2), (1, 2, 2)), conv(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        flat = self.signal(y.flatten(2)).reshape(len(x), 2, 4, -1, 2 * SIZE).relu()
        return self.head(self.volume(flat).flatten(1, 2)[:, :4])


def features(count: int) -> Tensor:
    return torch.randn(16 * count, 6)


def tokens(count: int) -> Tensor:
    return torch.randn(count, 7, 6)


def old_spectral() -> nn.Module:
    return chain(nn.utils.spectral_norm(conv()), nn.ReLU(), nn.utils.spectral_norm(conv(8, 8, 1)))


def new_spectral() -> nn.Module:
    norm = nn.utils.parametrizations.spectral_norm
    return chain(norm(conv()), nn.ReLU(), nn.utils.parametrizations.orthogonal(conv(8, 8, 1)))


def frozen() -> nn.Module:
    return chain(conv(), nn.BatchNorm2d(8)).requires_grad_(False)


def normed(**keys: Any) -> Callable[[], nn.Module]:
    return lambda: chain(conv(bias=False), nn.BatchNorm2d(8, **keys))


def last_memory() -> nn.Module:
    return chain(conv(), nn.BatchNorm2d(8)).to(memory_format=torch.channels_last)


STRANGE: dict[str, Strange] = {
    "reads its weight twice": Strange(lambda: chain(ReadsTwice(8, 8, 3))),
    "divides its input by its weight": Strange(lambda: chain(Normalized(8, 8, 3))),
    "borrowed weight": Strange(Borrows),
    "transposed by a function": Strange(Transposed, features),
    "transposed layer": Strange(TransposedLayer, features),
    "parameter class": Strange(OddParameter),
    "buffers change": Strange(Counts),
    "drifts": Strange(DependsOnCalls),
    "keywords only": Strange(KeywordsOnly, lambda n: {"image": torch.randn(n, 3, SIZE, SIZE)}),
    "any keywords": Strange(AnyKeywords, lambda n: {name: torch.randn(n, 3, SIZE, SIZE) for name in ("left", "right")}),
    "generator": Strange(Yields, forward=lambda model, x: list(model(x))),
    "generator as it is": Strange(Yields),
    "named tuple": Strange(ToNamed),
    "named tuple with none": Strange(ToNamedWithNone),
    "ordered": Strange(ToOrdered),
    "integers too": Strange(WithIntegers),
    "empty output": Strange(WithEmpty),
    "complex inside": Strange(Complex),
    "complex output": Strange(ToComplex),
    "complex weight": Strange(ComplexWeight),
    "words": Strange(Words, lambda n: torch.randint(0, 20, (n, 9))),
    "tied words": Strange(TiedWords, lambda n: torch.randint(0, 20, (n, 9))),
    "bytes": Strange(Bytes, lambda n: torch.randint(0, 256, (n, 3, SIZE, SIZE), dtype=torch.uint8)),
    "dictionaries": Strange(Dictionary),
    "weight of a property": Strange(lambda: chain(FromProperty(8, 8, 3, padding=1))),
    "weight as a buffer": Strange(WithBuffer),
    "weight as a buffer, norm": Strange(NormedBuffer),
    "bias as a buffer": Strange(BufferedBias),
    "not in one piece": Strange(spread),
    "answers all": Strange(Asks),
    "layer answers all": Strange(lambda: chain(AsksInside(8, 8, 3, padding=1), nn.ReLU(), AsksInside(8, 8, 1))),
    "hooks": Strange(with_hooks),
    "hook before the norm": Strange(hooked_norm),
    "norm of tokens": Strange(NormOfMany, tokens),
    "norm of as many tokens": Strange(NormOfManyAlike, tokens),
    "chance": Strange(Trained),
    "dropout": Strange(dropping),
    "norm in training": Strange(StaysInTraining),
    "wrapped part": Strange(Parallel),
    "compiled part": Strange(CompiledPart),
    "scripted part": Strange(ScriptedPart),
    "checkpointed": Strange(Checkpointed),
    "no gradients inside": Strange(NoGradInside),
    "inference inside": Strange(InferenceInside),
    "autocast": Strange(Autocasts),
    "detached": Strange(Detaches),
    "forward called": Strange(SkipsCalls),
    "called by class": Strange(ByClass),
    "conv_forward called": Strange(ByConvForward),
    "weight written": Strange(SwapsData),
    "bilinear": Strange(Sums, features),
    "recurrent": Strange(Recurrent, tokens),
    "attention": Strange(Attends, tokens),
    "without samples": Strange(Unbatched, lambda n: torch.randn(3, SIZE, SIZE)),
    "loops": Strange(
        Loops,
        lambda n: (torch.randn(n, 3, SIZE, SIZE), torch.tensor(2)),
        lambda model, batch: model(*batch),
    ),
    "on condition": Strange(OnCondition),
    "one layer": Strange(Flat, features),
    "casts": Strange(Half),
    "large and small": Strange(LargeAndSmall),
    "pixels apart": Strange(PixelsApart),
    "transposed, 1 and 3 axes": Strange(Upwards),
    "spectral norm, old": Strange(old_spectral),
    "spectral norm, new": Strange(new_spectral),
    "frozen": Strange(frozen),
    "norm without statistics": Strange(normed(track_running_stats=False)),
    "norm without momentum": Strange(normed(momentum=None)),
    "norm without affine": Strange(normed(affine=False)),
    "group norm": Strange(lambda: chain(conv(), nn.GroupNorm(2, 8))),
    "instance norm": Strange(lambda: chain(conv(), nn.InstanceNorm2d(8, affine=True))),
    "instance norm, statistics": Strange(lambda: chain(conv(), nn.InstanceNorm2d(8, track_running_stats=True))),
    "synchronized norm": Strange(lambda: chain(conv(bias=False), nn.SyncBatchNorm(8))),
    "channels last": Strange(
        last_memory, lambda n: torch.randn(n, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    ),
    "double": Strange(
        lambda: chain(conv(), nn.BatchNorm2d(8)).double(), lambda n: torch.randn(n, 3, SIZE, SIZE).double()
    ),
    "one sample": Strange(lambda: chain(conv(), nn.BatchNorm2d(8)), lambda n: torch.randn(1, 3, SIZE, SIZE)),
}
