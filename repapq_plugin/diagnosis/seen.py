"""What the quantizers of a finished network are given: distributions, chosen ranges, largest values by sample.

Memory does not grow with the number of batches, but for one number a channel and sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from repapq_plugin.core.hooks import Hooks
from repapq_plugin.core.running import Batch, inference
from repapq_plugin.core.tensors import first_tensor
from repapq_plugin.observers.histogram import HistogramRangeObserver
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize
from repapq_plugin.quantizers.layers import QuantizedLayer, weight_of

BINS = 4096
"""Of a histogram: the range that matters may be a small part of what was seen."""


@dataclass
class SeenTensor:
    """What one quantizer of activations was given.

    Args:
        layers: Module paths of the layers that read it.
        low: Smallest value of the chosen range.
        high: Largest value of it.
        num_bits: Bits of the grid.
        histogram: Distribution of all values.
        peaks: Largest absolute value of each sample and channel, by batch: float32 ``(samples, channels)``.
        values: How many there were.
        outside: How many of them were clipped; see `clipped`.
    """

    layers: list[str]
    low: float
    high: float
    num_bits: int
    histogram: HistogramRangeObserver = field(default_factory=lambda: HistogramRangeObserver(bins=BINS))
    peaks: list[Tensor] = field(default_factory=list)
    values: int = 0
    outside: int = 0

    @property
    def name(self) -> str:
        """What to call it."""
        return self.layers[0]

    @property
    def step(self) -> float:
        """Distance of two neighbours on the grid."""
        return (self.high - self.low) / ((1 << self.num_bits) - 1)

    @property
    def clipped(self) -> float:
        """Share of the values that are more than half a step outside the chosen range."""
        return self.outside / self.values if self.values else 0.0

    def add(self, x: Tensor) -> None:
        """Count the values of a tensor."""
        self.histogram(x)
        self.values += x.numel()
        low, high = self.low - self.step / 2, self.high + self.step / 2
        self.outside += int(((x < low) | (x > high)).sum())

    @property
    def by_sample(self) -> Tensor:
        """Return the largest absolute value of each channel in each sample, float32 ``(channels, samples)``."""
        return torch.cat(self.peaks).T if self.peaks else torch.zeros(0, 0)

    @property
    def outlying(self) -> float:
        """How many times as large as the typical channel of the typical sample the largest value is; 0: all are 0."""
        peaks = self.by_sample.flatten()
        typical = float(peaks[peaks > 0].median()) if bool((peaks > 0).any()) else 0.0
        return peaks.max().item() / typical if typical else 0.0


def by_channel(layer: nn.Module, x: Tensor) -> Tensor:
    """Return what a layer reads as ``(samples, channels, values)``; an input without samples is one."""
    x = x.detach()
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, 1) if x.dim() == 1 else x.movedim(-1, 1).flatten(2) if x.dim() > 2 else x[:, :, None]
    images = x if x.dim() == weight_of(layer).dim() else x[None]
    return images.flatten(2)


def observe_activations(model: nn.Module, run: Callable[[Batch], object], batches: Sequence[Batch]) -> list[SeenTensor]:
    """Run batches through a quantized network and look at what its quantizers of activations are given.

    Args:
        model: A network with the plugin's own quantizers; another one has none to look at.
        run: Makes a forward pass of it.
        batches: What to run.

    Returns:
        One entry for each quantizer that was given something, in call order.
    """
    seen: dict[LearnableFakeQuantize, SeenTensor] = {}
    first: dict[LearnableFakeQuantize, nn.Module] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer):
            quantizer = layer.input_fake_quant
            if quantizer in seen:
                seen[quantizer].layers.append(name)
            else:
                seen[quantizer], first[quantizer] = _empty(name, quantizer), layer
    here: dict[LearnableFakeQuantize, Tensor] = {}

    def see(quantizer: LearnableFakeQuantize, layer: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            x = first_tensor(args, kwargs)
            if x is None or not x.numel():
                return
            it = seen[quantizer]
            it.add(x.detach())
            peaks = by_channel(layer, x).abs().amax(2).float().cpu()
            before = here.get(quantizer)
            if before is not None and before.shape == peaks.shape:
                peaks = torch.maximum(peaks, before)  # a layer that is called several times in a pass
            here[quantizer] = peaks

        return hook

    with inference(model), Hooks() as hooks:
        for quantizer, layer in first.items():
            hooks.before(layer, see(quantizer, layer), with_kwargs=True)
        for batch in batches:
            here.clear()
            run(batch)
            for quantizer, peaks in here.items():
                seen[quantizer].peaks.append(peaks)
    return [it for it in seen.values() if it.peaks]


def _empty(name: str, quantizer: LearnableFakeQuantize) -> SeenTensor:
    scale, zero_point = quantizer.calculate_qparams()
    low = (quantizer.quant_min - zero_point).double() * scale.double()
    high = (quantizer.quant_max - zero_point).double() * scale.double()
    return SeenTensor([name], float(low.min()), float(high.max()), quantizer.num_bits)
