"""A network of a library, what is expected of it, and how it is quantized here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from repapq_plugin import CalibrationResult, RepAPQConfig, quantize_model
from repapq_plugin.core.tensors import floating_tensors
from tests.support.comparing import Numbers, flags, hooks_of, numbers

Raw = Callable[[nn.Module, Tensor], object]
"""Runs a network up to its raw outputs, as a user writes it for ``forward_fn``."""

NOT_CALLED = "not called in a forward pass"


@dataclass(frozen=True, eq=False)
class Network:
    """One network of a library, small and with random weights.

    Args:
        make: Builds it.
        raw: Runs it up to the outputs that are compared.
        size: Height and width of the images.
        blocks: The library's own classes of blocks with branches; every instance has to be merged.
        norms: The library's own classes of batch normalization, besides torch's.
        stays_float: What stays float: glob patterns of names, and a part of each one's reason.
        unordered: Whether outputs are queries in the order of their scores: then each channel is compared sorted.
        whole: Whether the network itself is exported, because layers run whose outputs are not among the raw ones.
    """

    make: Callable[[], nn.Module]
    raw: Raw
    size: tuple[int, int] = (64, 64)
    blocks: tuple[type[nn.Module], ...] = ()
    norms: tuple[type[nn.Module], ...] = ()
    stays_float: Mapping[str, str] = field(default_factory=dict)
    unordered: bool = False
    whole: bool = False

    def is_norm(self, module: nn.Module) -> bool:
        return isinstance(module, (nn.modules.batchnorm._BatchNorm, *self.norms))

    def images(self, count: int) -> Tensor:
        """Return patches of random colours under some noise: noise alone looks the same to layers that see far."""
        patches = nn.functional.interpolate(torch.rand(count, 3, 3, 3), size=self.size, mode="nearest")
        return 0.8 * patches + 0.2 * torch.rand(count, 3, *self.size)

    def outputs(self, model: nn.Module, images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return self.comparable(self.raw(model, images.clone()))

    def comparable(self, outputs: object) -> list[Tensor]:
        """Return what is compared of outputs: floating tensors, queries in an order that does not depend on scores."""
        tensors = floating_tensors(outputs)
        return [tensor.sort(dim=-2).values for tensor in tensors] if self.unordered else tensors

    def exported(self, model: nn.Module) -> nn.Module:
        return model if self.whole else RawOutputs(model, self.raw).eval()


class RawOutputs(nn.Module):
    """A network up to its raw outputs."""

    def __init__(self, network: nn.Module, raw: Raw) -> None:
        super().__init__()
        self.network, self.raw = network, raw

    def forward(self, images: Tensor) -> list[Tensor]:
        return floating_tensors(self.raw(self.network, images))


@dataclass(frozen=True)
class State:
    """Everything of a model that must not change."""

    numbers: Numbers
    flags: dict[str, bool]
    hooks: list[object]
    kinds: dict[str, type]
    training: dict[str, bool]

    @classmethod
    def of(cls, model: nn.Module) -> State:
        modules = dict(model.named_modules())
        kinds = {name: type(module) for name, module in modules.items()}
        modes = {name: module.training for name, module in modules.items()}
        return cls(numbers(model), flags(model), hooks_of(model), kinds, modes)


@dataclass(frozen=True)
class Run:
    """A network that was quantized.

    Args:
        network: What it is.
        model: The float network.
        before: Its state before.
        images: Images that calibration did not see.
        wanted: Its outputs on them before.
        result: What became of it.
    """

    network: Network
    model: nn.Module
    before: State
    images: Tensor
    wanted: list[Tensor]
    result: CalibrationResult


def settled(network: Network) -> tuple[nn.Module, list[Tensor]]:
    """Build a network whose activations are of a sane size, and images for its calibration.

    Batch norms take their statistics from the images. Random networks of this depth multiply any disturbance every few
    layers, which trained ones do not; small weights and positive biases of the norms calm them, and what hardly varies
    is not blown up. What starts at zero, as heads that refine boxes do, becomes random.
    """
    torch.manual_seed(0)
    model = network.make().eval()
    batches = [network.images(4) for _ in range(3)]
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for weight in model.parameters():
        if weight.dim() > 1 and not bool(weight.any()):
            nn.init.normal_(weight, std=0.02)
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.1, 0.2)
        nn.init.uniform_(norm.bias, 0.0, 1.0)
        norm.train()
        norm.momentum = None  # the plain mean over all batches
    for images in batches:
        network.outputs(model, images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum
        running = norm.running_var
        assert running is not None
        running.clamp_(min=1e-3)
    return model, batches


def quantized(network: Network, steps: int = 0) -> Run:
    """Quantize a network, its weights with 8 bits: ranges only, or some steps of learning on top."""
    model, batches = settled(network)
    images = network.images(2)
    before, wanted = State.of(model), network.outputs(model, images)
    config = RepAPQConfig(
        steps=steps,
        first_last_bits=None,
    )
    result = quantize_model(model, batches, config, forward_fn=network.raw)
    return Run(network, model, before, images, wanted, result)


def decibels(wanted: Tensor, got: Tensor) -> float:
    """Return the ratio of signal to noise. A mean that all values share is no signal."""
    signal = (wanted - wanted.mean()).pow(2).sum()
    noise = (wanted - got).pow(2).sum().clamp_min(1e-30)
    return float(10 * torch.log10(signal / noise))
