"""Small quantized networks, one for each thing that a graph can do, with random ranges already set."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.quant_primitives import activation_bounds, weight_bounds
from repapq_plugin.quantizers import plan
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize, PerChannelLearnableFakeQuantize
from repapq_plugin.quantizers.layers import QuantizedLayer, output_channels_axis, quantize_layer
from repapq_plugin.quantizers.plan import LayerPlan
from repapq_plugin.quantizers.skips import SkippingModule, find_skips, insert_skips
from repapq_plugin.targets import Target


def input_quantizer(bits: int) -> LearnableFakeQuantize:
    low, high = activation_bounds(bits)
    return LearnableFakeQuantize(quant_min=low, quant_max=high)


def quantized(
    layer: nn.Module, weight_bits: int, activation_bits: int, shared: LearnableFakeQuantize | None = None
) -> QuantizedLayer:
    low, high = weight_bounds(weight_bits)
    weight = PerChannelLearnableFakeQuantize(quant_min=low, quant_max=high, ch_axis=output_channels_axis(layer))
    return quantize_layer(layer, weight, shared or input_quantizer(activation_bits))


def float_copy(layer: QuantizedLayer) -> nn.Module:
    """Return a float layer, made anew, with weight and bias of a quantized one; nothing of the plugin takes part."""
    names = ["in_features", "out_features"] if isinstance(layer, nn.Linear) else ["in_channels", "out_channels"]
    if not isinstance(layer, nn.Linear):
        names += ["kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"]
    kind = next(kind for kind in (nn.Linear, nn.ConvTranspose2d, nn.Conv2d) if isinstance(layer, kind))
    copied = kind(**{name: getattr(layer, name) for name in names}, bias=layer.bias is not None)
    copied.load_state_dict({key: value for key, value in layer.state_dict().items() if key in copied.state_dict()})
    return copied


def set_ranges(model: nn.Module, *args: object, **kwargs: object) -> nn.Module:
    """Set every quantizer to the range that it sees in a float pass, and put the model in evaluation mode."""
    quantizers = [m for m in model.modules() if isinstance(m, LearnableFakeQuantize)]
    for quantizer in quantizers:
        quantizer.enable_fake_quant(False)
    with torch.no_grad():
        model.eval()(*args, **kwargs)
    for quantizer in quantizers:
        quantizer.enable_fake_quant(True)
        quantizer.enable_observer(False)
    return model


class Chain(nn.Module):
    layers, clamps, pairs = 3, 3, 3

    def __init__(self, w: int, a: int) -> None:
        super().__init__()
        self.first = quantized(nn.Conv2d(3, 8, 3, padding=1), w, a)
        self.second = quantized(nn.Conv2d(8, 8, 3, stride=2, padding=1), w, a)
        self.third = quantized(nn.Conv2d(8, 8, 1, bias=False), w, a)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).relu()).relu())


class Silu(Chain):
    """Activations on both sides of zero: zero points that are not 0."""

    def forward(self, x: Tensor) -> Tensor:
        return self.third(functional.silu(self.second(functional.silu(self.first(x)))))


class Residual(Chain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        y = functional.max_pool2d(y, 2) + self.second(y)
        return self.third(y.relu())


class SharedInput(nn.Module):
    """Two layers read one tensor through one quantizer; their outputs are concatenated."""

    layers, clamps, pairs = 4, 3, 3

    def __init__(self, w: int, a: int) -> None:
        super().__init__()
        shared = input_quantizer(a)
        self.stem = quantized(nn.Conv2d(3, 8, 3, padding=1), w, a)
        self.left = quantized(nn.Conv2d(8, 8, 3, padding=1), w, a, shared)
        self.right = quantized(nn.Conv2d(8, 4, 1), w, a, shared)
        self.last = quantized(nn.Conv2d(12, 4, 1), w, a)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.last(torch.cat([self.left(x).relu(), self.right(x).relu()], dim=1))


class Grouped(nn.Module):
    layers, clamps, pairs = 3, 3, 3

    def __init__(self, w: int, a: int) -> None:
        super().__init__()
        self.stem = quantized(nn.Conv2d(3, 8, 1), w, a)
        self.depthwise = quantized(nn.Conv2d(8, 8, 3, padding=1, groups=8), w, a)
        self.grouped = quantized(nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2), w, a)

    def forward(self, x: Tensor) -> Tensor:
        return self.grouped(self.depthwise(self.stem(x).relu()).relu())


class Transposed(nn.Module):
    layers, clamps, pairs = 3, 3, 3

    def __init__(self, w: int, a: int) -> None:
        super().__init__()
        self.down = quantized(nn.Conv2d(3, 8, 3, stride=2, padding=1), w, a)
        self.up = quantized(nn.ConvTranspose2d(8, 16, 2, stride=2), w, a)
        self.last = quantized(nn.Conv2d(16, 4, 1), w, a)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.up(self.down(x).relu()).relu())


class Classifier(nn.Module):
    """A float convolution in between, pooling, and linear layers; two outputs."""

    layers, clamps, pairs = 3, 3, 3

    def __init__(self, w: int, a: int) -> None:
        super().__init__()
        self.stem = quantized(nn.Conv2d(3, 8, 3, padding=1), w, a)
        self.plain = nn.Conv2d(8, 8, 3, padding=1)
        self.hidden = quantized(nn.Linear(8, 16), w, a)
        self.scores = quantized(nn.Linear(16, 5), w, a)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.plain(self.stem(x).relu()).relu()
        x = self.hidden(functional.adaptive_avg_pool2d(x, 1).flatten(1)).relu()
        return self.scores(x), x


class SharedHead(nn.Module):
    """One layer that is called on two levels."""

    layers, clamps, pairs = 4, 4, 4

    def __init__(self, w: int, a: int) -> None:
        super().__init__()
        self.stem = quantized(nn.Conv2d(3, 8, 3, padding=1), w, a)
        self.down = quantized(nn.Conv2d(8, 8, 3, stride=2, padding=1), w, a)
        self.head = quantized(nn.Conv2d(8, 6, 1), w, a)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.stem(x).relu()
        coarse = self.down(fine).relu()
        return self.head(fine), self.head(coarse + 4.0)


class Tokens(nn.Module):
    """Linear layers on ``(batch, tokens, features)``, which become matrix products."""

    layers, clamps, pairs = 2, 2, 2

    def __init__(self, w: int, a: int) -> None:
        super().__init__()
        self.first = quantized(nn.Linear(12, 8), w, a)
        self.second = quantized(nn.Linear(8, 8), w, a)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.flatten(2)).relu())


NETWORKS = (Chain, Silu, Residual, SharedInput, Grouped, Transposed, Classifier, SharedHead, Tokens)


def example(kind: type[nn.Module], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 6, 3, 4) if kind is Tokens else (2, 3, 12, 12)
    return torch.randn(shape, generator=generator)


def make(kind: type[nn.Module], weight_bits: int, activation_bits: int) -> tuple[nn.Module, Tensor]:
    """Return a network with ranges and an input for it."""
    torch.manual_seed(weight_bits * 10 + activation_bits)
    x = example(kind)
    return set_ranges(kind(weight_bits, activation_bits), x), x


def make_for(kind: type[nn.Module], weight_bits: int, activation_bits: int, target: Target) -> tuple[nn.Module, Tensor]:
    """Return what `make` does with all grids those of a target."""
    torch.manual_seed(weight_bits * 10 + activation_bits)
    config, x = RepAPQConfig(target=target), example(kind)
    model, shared = kind(weight_bits, activation_bits), {}
    for layer in [module for module in model.modules() if isinstance(module, QuantizedLayer)]:
        layer.weight_fake_quant = plan.weight_quantizer(layer, weight_bits, config)
        own = plan.input_quantizer(activation_bits, config)
        layer.input_fake_quant = shared.setdefault(layer.input_fake_quant, own)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    groups = {layer.input_fake_quant: number for number, layer in enumerate(layers.values())}
    plans = {
        name: LayerPlan(weight_bits, activation_bits, groups[layer.input_fake_quant]) for name, layer in layers.items()
    }
    if target.quantizes_residuals:
        for layer in layers.values():
            layer.input_fake_quant.enable_fake_quant(False)
        insert_skips(model, find_skips(model, lambda: model(x), plans), plans, layers, config)
        for module in model.modules():
            if isinstance(module, SkippingModule):
                module.skip_fake_quants.requires_grad_(False)
                for quantizer in module.skip_fake_quants:
                    quantizer.enable_observer(True)
    return set_ranges(model, x), x


def outputs_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        y = model(x)
    return list(y) if isinstance(y, tuple) else [y]
