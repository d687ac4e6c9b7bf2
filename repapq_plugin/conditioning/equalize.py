"""Cross-layer equalization: channels that share one activation grid are brought to a common size first.

A merged block can hold a channel that is nearly dead, with a tiny output and huge weights behind it, or one that
dwarfs all others. One scale per activation tensor, and one per output channel of a weight, then leave few codes for
the rest. Where a layer's output passes nothing but positively homogeneous modules on its way to other layers, a
channel may be divided by any positive number and the weights that read it multiplied by the same: the float network
computes what it did (Nagel et al., arXiv:1906.04721, section 4.1). RepAPQ's affine layer scales the same channels,
but starts from one and sees only its own stage; our choice is to begin here. On the MobileOne reference network
W8A8 without it stays 0.5 points below float, because one input channel of its merged weights is 276 times their mean.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from repapq_plugin.conditioning.channels import largest_weights, read_channels
from repapq_plugin.core.tensor_notes import TensorNotes
from repapq_plugin.core.tensors import tensors_of

logger = logging.getLogger(__name__)

HOMOGENEOUS = (
    *(nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout, nn.Dropout2d),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)
"""Modules with f(s * x) = s * f(x) for s > 0, channel by channel."""

LIMIT = 256.0
"""A channel is scaled by at most this against the typical one of its tensor: noise of dead channels stays small."""

_TOLERANCE = 1e-4
# Batches on which the size of channels is measured; a maximum over some hundred images is typical enough.
_BATCHES = 8


class _Readers(TorchFunctionMode):
    """Sees, over one run, which layers read each layer's output, and whether anything else did."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[nn.Module] = Counter()
        self.readers: dict[nn.Module, set[nn.Module]] = {}
        self.used_elsewhere: set[nn.Module] = set()
        self.given: dict[nn.Module, nn.Module | None] = {}
        self._makers: TensorNotes[nn.Module] = TensorNotes()
        self._reading: list[Tensor] = []

    def module_runs(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            self._reading.append(args[0])
            self.given[module] = self._makers.get(args[0])
        else:
            self.given[module] = None

    def layer_ran(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.calls[layer] += 1
        maker = self._finish(layer, args)
        if maker is not None:
            self.readers.setdefault(maker, set()).add(layer)
        if isinstance(output, Tensor):
            self._makers.put(output, layer)

    def homogeneous_ran(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        maker = self._finish(module, args)
        if maker is not None and isinstance(output, Tensor):
            self._makers.put(output, maker)

    def _finish(self, module: nn.Module, args: tuple[Any, ...]) -> nn.Module | None:
        if args and isinstance(args[0], Tensor) and self._reading:
            self._reading.pop()
        return self.given.pop(module, None)

    def note_use(self, values: Any) -> None:
        for tensor in tensors_of(values):
            layer = None if any(tensor is read for read in self._reading) else self._makers.get(tensor)
            if layer is not None:
                self.used_elsewhere.add(layer)

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if tensors_of(result):  # reading a shape or a dtype gives none
            self.note_use([args, kwargs or {}])
        return result


def _can_scale(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d | nn.Linear) and "weight" in layer._parameters


def find_links(
    model: nn.Module, run: Callable[[], Any], layers: Collection[nn.Module]
) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Return each layer whose output nothing but other layers read, with those layers, in call order.

    Args:
        model: The merged float network.
        run: Makes one forward pass of it.
        layers: Those that may be changed.
    """
    watch = _Readers()
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
                after: Any = watch.layer_ran
            elif isinstance(module, HOMOGENEOUS):
                after = watch.homogeneous_ran
            else:
                continue
            stack.callback(module.register_forward_pre_hook(watch.module_runs).remove)
            stack.callback(module.register_forward_hook(after).remove)
        with watch:
            result = run()
        watch.note_use(result)
    shared = Counter(id(p) for m in dict.fromkeys(model.modules()) for p in m._parameters.values() if p is not None)

    def changeable(layer: nn.Module) -> bool:
        own = all(shared[id(p)] == 1 for p in layer._parameters.values() if p is not None)
        return layer in layers and _can_scale(layer) and watch.calls[layer] == 1 and own

    return [
        (maker, sorted(readers, key=list(watch.calls).index))
        for maker, readers in watch.readers.items()
        if maker not in watch.used_elsewhere
        and changeable(maker)
        # A convolution's channels lie in the second axis, a linear layer's in the last.
        and all(
            changeable(reader) and isinstance(reader, nn.Linear) == isinstance(maker, nn.Linear) for reader in readers
        )
    ]


def _is_depthwise(layer: Any) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1


def channel_scales(sizes: Tensor, readers: Sequence[nn.Module]) -> Tensor:
    """Return the number by which each channel is divided, float64 ``[channels]``.

    Behind depthwise layers, each channel has a weight scale of its own and takes any factor for free: all channels
    become equally large. Dense weights share a scale over their input channels: there the geometric mean of what
    activations and weights would want.

    Args:
        sizes: Typical largest absolute value of each channel, float64.
        readers: Layers that read the tensor.
    """
    dense = [largest_weights(reader) for reader in readers if not _is_depthwise(reader)]
    alive = sizes > 0
    scales = torch.where(alive, sizes, 1.0)
    if dense:
        largest = torch.stack([column / column.mean().clamp_min(1e-30) for column in dense]).amax(0)
        alive &= largest > 0
        scales = (scales / torch.where(largest > 0, largest, 1.0)).sqrt()
    if not bool(alive.any()):
        return torch.ones_like(sizes)
    typical = scales[alive].log().mean().exp()
    return torch.where(alive, (scales / typical).clamp(1 / LIMIT, LIMIT), 1.0)


@torch.no_grad()
def _scale(maker: Any, readers: Iterable[Any], scales: Tensor) -> None:
    dtype = maker.weight.dtype
    maker.weight.copy_((maker.weight.double() / scales.reshape(-1, *[1] * (maker.weight.dim() - 1))).to(dtype))
    if maker.bias is not None:
        maker.bias.copy_((maker.bias.double() / scales).to(dtype))
    for reader in readers:
        groups = getattr(reader, "groups", 1)
        weight = reader.weight.double().unflatten(0, (groups, -1))
        by_group = scales.reshape(groups, 1, -1, *[1] * (reader.weight.dim() - 2))
        reader.weight.copy_((weight * by_group).flatten(0, 1).to(dtype))


@torch.no_grad()
def equalize_channels(
    model: nn.Module, run: Callable[[Any], Any], batches: Sequence[Any], names: Collection[str]
) -> tuple[str, ...]:
    """Equalize the channels of ``model`` in place; it computes what it did before, to float rounding.

    Args:
        model: The merged float network, in evaluation mode.
        run: Makes a forward pass of it on a batch.
        batches: Calibration batches; a few of them show how large channels are.
        names: Module paths of the layers that may be changed: those that are quantized.

    Returns:
        Names of the layers whose output channels were rescaled, in call order.
    """
    named = dict(model.named_modules())
    links = find_links(model, lambda: run(batches[0]), {named[name] for name in names})
    if not links:
        return ()
    before = copy.deepcopy(model.state_dict())
    wanted = [tensor.clone() for tensor in tensors_of(run(batches[0]))]
    sizes = _channel_sizes([readers[0] for _, readers in links], run, batches[:_BATCHES])
    for maker, readers in links:
        if readers[0] in sizes:
            _scale(maker, readers, channel_scales(sizes[readers[0]], readers))
    outputs = tensors_of(run(batches[0]))
    for actual, expected in zip(outputs, wanted, strict=True):
        if not _equal(actual, expected):
            model.load_state_dict(before)
            logger.warning("Equalizing channels changes what the network computes; it is left as it was.")
            return ()
    paths = {module: name for name, module in named.items()}
    return tuple(paths[maker] for maker, _ in links)


def _equal(actual: Tensor, expected: Tensor) -> bool:
    if not expected.numel():
        return True
    return bool(((actual - expected).abs().max() <= _TOLERANCE * expected.abs().max()).item())


def _channel_sizes(
    readers: Sequence[nn.Module], run: Callable[[Any], Any], batches: Sequence[Any]
) -> dict[nn.Module, Tensor]:
    """Return the mean over batches of the largest absolute value of each channel that a layer reads."""
    sizes: dict[nn.Module, Tensor] = {}

    def see(reader: nn.Module, values: Tensor) -> None:
        largest = values.abs().amax(dim=1).double() / len(batches)
        sizes[reader] = sizes.get(reader, torch.zeros_like(largest)) + largest

    read_channels(readers, run, batches, see)
    return sizes
