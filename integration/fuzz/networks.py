"""A random network, its batches and a configuration from one integer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from integration.fuzz.blocks import BLOCKS
from integration.fuzz.draw import Draw
from integration.fuzz.layers import Shape, spoil
from repapq_plugin import RepAPQConfig
from repapq_plugin.core.copies import own_batch, own_copy
from repapq_plugin.core.running import call_model, seeded
from repapq_plugin.targets import TARGETS

LARGEST = 1500
"""Values of one sample's activation."""

SAMPLES = 4
"""In a batch."""


@dataclass
class Case:
    """What is put to the test.

    Args:
        seed: What it was drawn from.
        model: The network.
        batches: For calibration.
        keys: Of the configuration.
    """

    seed: int
    model: nn.Module
    batches: list[object]
    keys: dict[str, object]

    def config(self) -> RepAPQConfig:
        """Return the configuration."""
        return RepAPQConfig.from_dict(self.keys)


@dataclass
class Answer:
    """What a network may return."""

    scores: Tensor
    rest: list[Tensor]


class Named(NamedTuple):
    """The same as a named tuple, with something missing."""

    scores: Tensor
    nothing: None
    rest: tuple[Tensor, ...]


WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)

OUTPUTS: dict[str, Callable[[list[Tensor]], object]] = {
    "tensor": lambda made: made[0],
    "tuple": tuple,
    "list": list,
    "dict": lambda made: {f"level{index}": level for index, level in enumerate(made)},
    "dataclass": lambda made: Answer(made[0], made[1:]),
    "named": lambda made: Named(made[0], None, tuple(made[1:])),
    "nested": lambda made: {"levels": [(level, None) for level in made], "count": len(made), "name": "x"},
    "with integers": lambda made: (made[0], made[0].argmax(1)),
    "last twice": lambda made: (made[-1], made[-1]),
}


class Network(nn.Module):
    """Parts in a row, and heads on some of what they make.

    Args:
        parts: In the order of their calls.
        heads: By the index of the part that they read; several may be one module.
        output: A key of `OUTPUTS`.
    """

    def __init__(self, parts: list[nn.Module], heads: dict[int, nn.Module], output: str) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.heads = nn.ModuleDict({f"at{index}": head for index, head in heads.items()})
        self.output = output

    def forward(self, x: Tensor) -> object:
        made = []
        for index, part in enumerate(self.parts):
            x = part(x)
            if f"at{index}" in self.heads:
                made.append(self.heads[f"at{index}"](x))
        return OUTPUTS[self.output](made or [x])


class ByName(Network):
    """Takes its input by name, beside another that it does not need."""

    def forward(self, *, image: Tensor, scale: float = 1.0) -> object:  # type: ignore[override]
        return super().forward(image * scale)


class InPlace(Network):
    """Changes what it is given."""

    def forward(self, x: Tensor) -> object:
        return super().forward(x.sub_(0.1))


class Flattened(nn.Module):
    """A linear layer on everything, or on means."""

    def __init__(self, shape: Shape, outputs: int, mean: bool) -> None:
        super().__init__()
        self.mean = mean
        self.fc = nn.Linear(shape[0] if mean else int(torch.tensor(shape).prod()), outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(2).mean(-1) if self.mean and x.dim() > 2 else x.flatten(1))


def drawn(seed: int) -> Case:
    """Return what an integer stands for; the same on every machine, up to rounding of torch's kernels."""
    for attempt in itertools.count():
        draw = Draw(f"{seed}, {attempt}")
        with seeded(seed), torch.inference_mode(False), torch.no_grad():
            case = Case(seed, *_drawn(draw))
            with suppress(ValueError, RuntimeError):  # torch refuses norms without statistics that see one value
                for batch in case.batches:
                    call_model(own_copy(case.model), own_batch(batch))
                return case
    raise AssertionError


def _drawn(draw: Draw) -> tuple[Network, list[object], dict[str, object]]:
    axes = draw.weighted([(2, 7.0), (1, 1.5), (3, 0.7), (0, 0.8)])
    sizes = (1, 2, 3, 5, 7, 8, 12) if axes < 3 else (1, 2, 3, 5)
    shape: Shape = (draw.of(1, 2, 3, 4), *(draw.of(*sizes) for _ in range(axes)))
    model = settled(draw, network(draw, shape), shape)
    batches = data(draw, shape)
    if isinstance(model, ByName):
        batches = [{"image": batch} for batch in batches]
    elif draw.chance(0.1):
        batches = [(batch, torch.zeros(len(batch))) for batch in batches]
    return model, batches, settings(draw, model)


def network(draw: Draw, shape: Shape) -> Network:
    """Return a network for inputs of a shape."""
    given, parts, shapes = shape, list[nn.Module](), list[Shape]()
    for _ in range(draw.whole(1, 4)):
        part, shape = fitting(draw, shape)
        parts.append(part)
        shapes.append(shape)
    heads: dict[int, nn.Module] = {}
    last = len(parts) - 1
    if draw.chance(0.6):
        heads[last] = Flattened(shape, draw.width(), draw.chance(0.6))
    alike = [index for index in range(last) if shapes[index][0] == shape[0]]
    if alike and heads and heads[last].mean and draw.chance(0.6):
        heads = {draw.of(*alike): heads[last], last: heads[last]}
    elif last and draw.chance(0.3):
        index = draw.whole(0, last - 1)
        heads[index] = Flattened(shapes[index], 2, draw.chance(0.5))
        heads = dict(sorted(heads.items()))
    kind = draw.weighted([(Network, 8.0), (ByName, 1.0), (InPlace, 1.0)])
    output = draw.of("tensor", "tensor", "tensor", *OUTPUTS)
    return kind(parts, heads, output) if given else Network(parts, heads, output)


@torch.no_grad()
def fitting(draw: Draw, shape: Shape) -> tuple[nn.Module, Shape]:
    """Draw until a part runs on inputs of a shape; return it and the shape of what it makes."""
    for _ in range(8):
        try:
            part = draw.weighted(BLOCKS)(draw, shape).eval()
            made = part(torch.zeros(2, *shape)).shape
        except (RuntimeError, ValueError, AssertionError):  # torch refuses a size, or timm a group
            continue
        if len(made) == len(shape) + 1 and made[0] == 2 and 0 < made[1:].numel() <= LARGEST:
            return part, tuple(made[1:])
    return nn.Identity(), shape


def settled(draw: Draw, model: Network, shape: Shape) -> Network:
    """Give norms statistics of the network's own, or odd ones; some networks keep those of the start."""
    if draw.chance(0.8):
        with torch.no_grad():
            for module in model.modules():
                module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
            for _ in range(2):
                batch = torch.randn(8, *shape)
                try:
                    model(image=batch) if isinstance(model, ByName) else model(batch)
                except ValueError:  # a norm wants more than one value for each channel
                    break
    for module in model.modules():
        spoil(draw, module)
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() > 1 and draw.chance(0.07):
            with torch.no_grad():
                weight[draw.whole(0, len(weight) - 1)] *= draw.of(0.0, 1e-20, 1e3)
    model.train(draw.chance(0.1))
    return model


def data(draw: Draw, shape: Shape) -> list[Any]:
    """Return batches, of which some are odd."""
    count, samples = draw.whole(1, 3), draw.of(1, 2, SAMPLES, SAMPLES, SAMPLES)
    gain, shift = draw.of(1.0, 1.0, 1.0, 1e-3, 1e3), draw.of(0.0, 0.0, 0.0, 1.0, -10.0)
    batches = [torch.randn(samples, *shape) * gain + shift for _ in range(count)]
    kind = draw.weighted(
        [("", 8.0), ("outlier", 1.0), ("zeros", 0.5), ("sizes", 1.0), ("positive", 1.0), ("empty", 0.2)]
    )
    if kind == "outlier":
        batches[-1][0] *= 100
    elif kind == "zeros":
        batches[-1].zero_()
    elif kind == "sizes":
        batches.append(torch.randn(samples + 1, *shape))
    elif kind == "positive":
        batches = [batch.abs() for batch in batches]
    elif kind == "empty":
        batches.append(torch.randn(0, *shape))
    return batches


def settings(draw: Draw, model: Network) -> dict[str, object]:
    """Return a configuration's keys; patterns name parts of the network that there may be after the merge."""
    names = [name for name, module in model.named_modules() if name.count(".") and isinstance(module, WEIGHTED)]
    layer, part = draw.of(*names) if names else "*", f"parts.{draw.whole(0, len(model.parts) - 1)}"
    if draw.chance(0.4):
        bits = (8, 8)
    elif draw.chance(0.5):
        bits = draw.of((6, 6), (4, 4), (3, 3), (2, 2))
    else:
        bits = (draw.whole(2, 8), draw.whole(2, 8))
    keys: dict[str, object] = {"weight_bits": bits[0], "activation_bits": bits[1], "seed": draw.whole(0, 99)}
    keys["steps"] = draw.of(0, 0, 1, 2, 3)
    options: dict[str, tuple[object, ...]] = {
        "target": tuple(TARGETS),
        "first_last_bits": (None, 8, 4),
        "reduce_range": (True,),
        "activation_observer": ("min_max", "mse", "mae", "percentile"),
        "weight_observer": ("min_max",),
        "fold_constants": (False,),
        "equalize": (False,),
        "solve": (True,),
        "affine": (False,),
        "loss": ("mae",),
        "schedule": ("unit", "network"),
        "network_steps": (1, 2),
        "views": (2,),
        "drop_probability": (0.5, 1.0),
        "guard_fraction": (0.0, 0.5),
        "stage_weight": (0.0,),
        "keep_float": ((layer,), (f"{part}*",)),
        "units": (("parts.*",),),
        "stages": ((part,), ("parts.?",)),
        "layer_bits": ({layer: (2, 8)}, {"*": (5, 3)}, {f"{part}*": (3, 3), "*": (8, 6)}),
        "cache_bytes": (0,),
    }
    for key, values in options.items():
        if draw.chance(0.35 if key in ("activation_observer", "schedule") else 0.15):
            keys[key] = draw.of(*values)
    return keys
