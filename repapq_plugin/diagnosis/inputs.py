"""What units multiply: the inputs of their layers over all batches, and the weights that read each channel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from repapq_plugin.backend import OwnQuantizer
from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.hooks import Hooks, unseen
from repapq_plugin.core.quant_primitives import choose_qparams, fake_quantize
from repapq_plugin.core.running import Batch
from repapq_plugin.core.tensors import first_tensor
from repapq_plugin.diagnosis.seen import by_channel
from repapq_plugin.diagnosis.statistics import ChannelStatistics
from repapq_plugin.diagnosis.table import TensorFigures, figures_of
from repapq_plugin.errors import MergeError
from repapq_plugin.method.starting_ranges import set_weight_range
from repapq_plugin.quantizers.layers import weight_of
from repapq_plugin.quantizers.plan import input_quantizer, weight_quantizer
from repapq_plugin.reparam.branches import branches_of
from repapq_plugin.reparam.layer_maps import branch_map, flattened, input_channels

Run = Callable[[Batch], object]
Rounds = Callable[[Tensor], Tensor]
"""Quantizes what a layer is given."""


@dataclass
class SeenInput:
    """What one layer reads.

    Args:
        statistics: Of its channels.
        peaks: Largest absolute value of each sample and channel, by batch: float32 ``(samples, channels)``.
    """

    statistics: ChannelStatistics
    peaks: list[Tensor] = field(default_factory=list)

    @property
    def figures(self) -> TensorFigures:
        """Return its figures."""
        return TensorFigures(figures_of(self.statistics.together), figures_of(self.statistics.by_channel))

    @property
    def by_sample(self) -> Tensor:
        """Return the largest absolute value of each channel in each sample, ``(channels, samples)``."""
        return torch.cat(self.peaks).T if self.peaks else torch.zeros(0, 0)


def see_inputs(
    layers: Mapping[str, nn.Module],
    run: Run,
    batches: Sequence[Batch],
    rounds: Mapping[str, Rounds] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, SeenInput]:
    """Run batches and sum up what layers read.

    Args:
        layers: By name.
        run: Makes a forward pass of the network that they are in.
        batches: All of them.
        rounds: What quantizes each layer's input, to measure its noise.
        advance: Called after each batch.

    Returns:
        By the same names; a layer that read nothing is missing.
    """
    seen: dict[str, SeenInput] = {}
    here: dict[str, Tensor] = {}

    def see(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            x = first_tensor(args, kwargs)
            if x is None or not x.numel():
                return
            with unseen():
                values = by_channel(layer, x)
                if name not in seen:
                    seen[name] = SeenInput(ChannelStatistics(values.shape[1], values.device))
                seen[name].statistics.add(values)
                if rounds is not None:
                    seen[name].statistics.add_noise(values, by_channel(layer, rounds[name](x)))
                peaks, before = values.abs().amax(2).float().cpu(), here.get(name)
                # A layer that is called several times in a pass reads the same samples each time.
                again = before is not None and before.shape == peaks.shape
                here[name] = torch.maximum(peaks, before) if before is not None and again else peaks

        return hook

    def keep() -> None:
        for name, peaks in here.items():
            seen[name].peaks.append(peaks)
        here.clear()
        advance()

    _run_hooked(layers, see, run, batches, keep)
    return seen


def add_noise(
    seen: Mapping[str, SeenInput],
    layers: Mapping[str, nn.Module],
    bits: Mapping[str, int],
    run: Run,
    batches: Sequence[Batch],
    config: RepAPQConfig,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Run batches again and measure the noise of ranges from the smallest to the largest value of each tensor."""
    rounds = {name: _min_max(it, bits[name], config) for name, it in seen.items()}

    def see(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            x = first_tensor(args, kwargs)
            if x is not None and x.numel():
                with unseen():
                    seen[name].statistics.add_noise(by_channel(layer, x), by_channel(layer, rounds[name](x)))

        return hook

    _run_hooked({name: layers[name] for name in seen}, see, run, batches, advance)


def _run_hooked(
    layers: Mapping[str, nn.Module],
    see: Callable[[str], Callable[..., None]],
    run: Run,
    batches: Sequence[Batch],
    after: Callable[[], None],
) -> None:
    with torch.no_grad(), Hooks() as hooks:
        for name, layer in layers.items():
            hooks.before(layer, see(name), with_kwargs=True)
        for batch in batches:
            run(batch)
            after()


def _min_max(seen: SeenInput, bits: int, config: RepAPQConfig) -> Rounds:
    grid = input_quantizer(bits, config)
    low, high = seen.statistics.low.min(), seen.statistics.high.max()
    symmetric = config.runs_on.symmetric_activations
    scale, zero_point = choose_qparams(low, high, grid.quant_min, grid.quant_max, symmetric=symmetric)
    return lambda x: fake_quantize(x, scale.to(x.dtype), zero_point, grid.quant_min, grid.quant_max)


def weight_figures(layer: nn.Module, bits: int, config: RepAPQConfig) -> TensorFigures:
    """Return figures of a layer's weights by the channel that they read, and the noise of their starting grid."""
    weight = weight_of(layer).detach()
    quantizer = OwnQuantizer(weight_quantizer(layer, bits, config).to(weight.device))
    set_weight_range(quantizer, weight, config)
    rounded = fake_quantize(weight, *quantizer.qparams(), *quantizer.bounds, quantizer.ch_axis)
    return _figures([(_by_input(layer, weight), _by_input(layer, rounded))])


def branch_figures(block: nn.Module, bits: int, config: RepAPQConfig) -> TensorFigures | None:
    """Return the same of a block's branches, each by itself with its norm; ``None`` of a block without known ones."""
    try:
        spec = branches_of(block)
        if spec is None:
            return None
        chains = [flattened(branch.layers) for branch in spec.branches]
        channels = next(filter(None, map(input_channels, chains)), None)
        if channels is None:
            return None
        like = next(block.parameters()).detach().double()
        maps = [branch_map(chain, channels, like, type(block).__name__) for chain in chains if chain]
    except (MergeError, StopIteration):
        return None
    pairs = []
    for kernel in maps:
        weight = kernel.weight.float()
        quantizer = OwnQuantizer(weight_quantizer(block, bits, config).to(weight.device))
        set_weight_range(quantizer, weight, config)
        rounded = fake_quantize(weight, *quantizer.qparams(), *quantizer.bounds, quantizer.ch_axis)
        pairs.append((_grouped(weight, kernel.groups), _grouped(rounded, kernel.groups)))
    return _figures(pairs)


def moved_figures(layer: nn.Module, before: nn.Module) -> TensorFigures:
    """Return figures of a calibrated layer's weights; their noise is what they differ by from the float ones."""
    return _figures([(_by_input(layer, weight_of(before).detach()), _by_input(layer, weight_of(layer).detach()))])


def _by_input(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a layer's weight as ``(1, input channels, values)``."""
    if isinstance(layer, nn.ConvTranspose2d):
        return weight.flatten(1)[None]
    return _grouped(weight, int(getattr(layer, "groups", 1)))


def _grouped(weight: Tensor, groups: int) -> Tensor:
    parts = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return parts.transpose(1, 2).reshape(1, groups * weight.shape[1], -1)


def _figures(pairs: Iterable[tuple[Tensor, Tensor]]) -> TensorFigures:
    statistics: ChannelStatistics | None = None
    for weight, rounded in pairs:
        if statistics is None:
            statistics = ChannelStatistics(weight.shape[1], weight.device)
        statistics.add(weight)
        statistics.add_noise(weight, rounded)
    if statistics is None:
        raise ValueError("there is no weight")
    return TensorFigures(figures_of(statistics.together), figures_of(statistics.by_channel))
