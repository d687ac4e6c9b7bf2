"""Residual additions: the input that skips the layers is quantized too, where a target wants it.

A runtime that adds inside an integer convolution needs the other summand in integers; of the layer's own output it
makes none before the sum is done. So the other summand gets a quantizer, and nothing else changes. An addition is
Python code of the module around it. That module plays the role of a `SkippingModule`: while its forward runs, every
addition to the output of a module that is named is made with the other summand rounded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.hooks import Hooks
from repapq_plugin.core.modules import become, may_become, resign
from repapq_plugin.core.tensor_notes import TensorNotes
from repapq_plugin.core.tensors import version_of
from repapq_plugin.core.watch import FunctionWatch
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize
from repapq_plugin.quantizers.layers import OUTPUT, QuantizedLayer
from repapq_plugin.quantizers.plan import LayerPlan, SkipPlan, input_quantizer

ADDITIONS = ("add", "add_")
"""Names of the functions that add two tensors, the operators among them."""

SKIPS = "skip_fake_quants"
"""Child of a `SkippingModule` that holds its quantizers."""


class _Additions(FunctionWatch):
    """Sees additions to the outputs of layers, and in the forward of which module they are made."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []
        self.givers: TensorNotes[str] = TensorNotes()
        """The last module that has returned a tensor: the layer, an identity behind it, or what holds both."""
        self.from_layers: TensorNotes[tuple[int, str]] = TensorNotes()
        """The layer whose output a tensor is, behind how many had run before it; until it is changed in place."""
        self.read: dict[int, int | None] = {}
        """Group of the layers that read a tensor, by its identity."""
        self.kept: list[Tensor] = []  # so that identities stay unique
        self.found: dict[str, tuple[str, set[str], set[int | None]]] = {}
        """By the module that gives one summand: its layer, the modules that add it, and groups that read the other."""

    def before(self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        if name in ADDITIONS and self.running:
            pair = [value for value in args[:2] if isinstance(value, Tensor)]
            if len(pair) == 2 and pair[0].shape == pair[1].shape and pair[0].is_floating_point():
                self._note(pair)
        return [version_of(value) if isinstance(value, Tensor) else 0 for value in args]

    def _note(self, pair: list[Tensor]) -> None:
        # Of two layers' outputs, a shortcut is the one that other layers read, or else the one that was made later.
        turns = [
            (id(value) in self.read, turn, place)
            for place, value in enumerate(pair)
            if (turn := self.from_layers.get(value)) is not None
        ]
        if not turns:
            return
        _, (_, layer), place = min(turns)
        giver = self.givers.get(pair[place])
        if giver is not None:
            _, adding, others = self.found.setdefault(giver, (layer, set(), set()))
            adding.add(self.running[-1])
            others.add(self.read.get(id(pair[1 - place])))

    def after(
        self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object], result: object, note: list[int]
    ) -> None:
        """What was changed in place is no layer's output any more."""
        for value, version in zip(args, note, strict=True):
            if isinstance(value, Tensor) and version_of(value) != version:
                self.from_layers.forget(value)
                self.read.pop(id(value), None)


def find_skips(model: nn.Module, run: Callable[[], object], plans: Mapping[str, LayerPlan]) -> dict[str, SkipPlan]:
    """Return how the other summands of layers' outputs are quantized, by the path of the module that gives the output.

    A summand that a quantized layer reads too shares its quantizer; others take as many bits as the layer reads.

    Args:
        model: The merged float network.
        run: Makes one forward pass of it.
        plans: Layers that are quantized, by module path.
    """
    watch = _Additions()
    turns = itertools.count()

    def starts(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[object, ...]) -> None:
            watch.running.append(name)
            x = args[0] if args else None
            if name in plans and isinstance(x, Tensor):
                watch.kept.append(x)
                watch.read[id(x)] = plans[name].input_group

        return hook

    def ends(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: object, output: object) -> None:
            watch.running.pop()
            if isinstance(output, Tensor):
                watch.givers.put(output, name)
                if name in plans:
                    watch.from_layers.put(output, (next(turns), name))

        return hook

    with Hooks() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            hooks.before(module, starts(name))
            hooks.after(module, ends(name))
        with watch:
            run()
    modules = dict(model.named_modules())
    skips: dict[str, SkipPlan] = {}
    for giver, (layer, places, groups) in watch.found.items():
        adding = places.pop()
        inside = giver.startswith(f"{adding}.") if adding else bool(giver)
        if places or not inside or not may_become(modules[adding]):
            continue
        group = groups.pop() if len(groups) == 1 else None
        skips[giver] = SkipPlan(adding, layer, plans[layer].activation_bits, group)
    return skips


class _Rounding(TorchFunctionMode):
    """Rounds what is added to the outputs of modules."""

    def __init__(self, outputs: TensorNotes[nn.Module]) -> None:
        super().__init__()
        self.outputs = outputs

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in ADDITIONS and len(args) > 1:
            for position in (1, 0):
                quantizer, other = self.outputs.get(args[position]), args[1 - position]
                if quantizer is not None and isinstance(other, Tensor) and other.shape == args[position].shape:
                    args = self._with_rounded(quantizer, args, 1 - position, in_place=name == "add_")
                    break
            if name == "add_":
                self.outputs.forget(args[0])  # it is a sum now
        return func(*args, **(kwargs or {}))

    def _with_rounded(
        self, quantizer: nn.Module, args: tuple[Any, ...], position: int, *, in_place: bool
    ) -> tuple[Any, ...]:
        """Return arguments with one of the two summands rounded; the one that is added to stays the tensor it is."""
        changed = in_place and position == 0
        x = args[position].clone() if changed else args[position]  # its gradient needs it as it was
        hat = cast(Tensor, quantizer(x))
        if hat is x:
            return args
        if changed and not torch.onnx.is_in_onnx_export():  # which makes a sum of its own of it anyway
            args[0].copy_(hat)
            return args
        return (args[0], hat, *args[2:]) if position else (hat, *args[1:])


class SkippingModule(nn.Module):
    """The role of a module that adds to the outputs of others: the other summand is rounded. Made by `insert_skips`.

    ``skip_fake_quants`` holds the quantizers; ``skip_givers`` says, path by path, whose outputs they belong to.
    """

    skip_fake_quants: nn.ModuleList
    skip_givers: list[str]

    def forward(self, *args: object, **kwargs: object) -> object:
        """Run the module's own forward."""
        outputs: TensorNotes[nn.Module] = TensorNotes()

        def giving(quantizer: nn.Module) -> Callable[..., None]:
            def hook(_: nn.Module, args: object, output: object) -> None:
                if isinstance(output, Tensor):
                    outputs.put(output, quantizer)

            return hook

        with Hooks() as hooks, _Rounding(outputs):
            for name, quantizer in zip(self.skip_givers, self.skip_fake_quants, strict=True):
                hooks.after(self.get_submodule(name), giving(quantizer))
            return super().forward(*args, **kwargs)


def skipping(module: nn.Module) -> SkippingModule:
    """Return a module in the role, with no quantizers yet if it did not play it."""
    if not isinstance(module, SkippingModule):
        module = become(module, SkippingModule)
        module.skip_fake_quants, module.skip_givers = nn.ModuleList(), []
    return module


def insert_skips(
    model: nn.Module,
    skips: Mapping[str, SkipPlan],
    plans: Mapping[str, LayerPlan],
    layers: Mapping[str, QuantizedLayer],
    config: RepAPQConfig,
) -> dict[str, LearnableFakeQuantize]:
    """Let the modules that add be `SkippingModule`, in place.

    Args:
        model: A network whose planned layers are quantized.
        skips: From `find_skips`.
        plans: How each layer is quantized, by module path.
        layers: Those layers.
        config: Says the grids.

    Returns:
        The quantizers by the path of the module that gives the layer's output; shared ones are those of a layer.
    """
    by_group = {plans[name].input_group: layer.input_fake_quant for name, layer in layers.items()}
    made: dict[str, LearnableFakeQuantize] = {}
    for giver, plan in skips.items():
        adding = skipping(model.get_submodule(plan.adding))
        quantizer = None if plan.input_group is None else by_group.get(plan.input_group)
        if quantizer is None:
            quantizer = input_quantizer(plan.bits, config)
            quantizer.enable_observer(False)
            quantizer.to(next(iter(layers.values())).input_fake_quant.log_scale.device).eval()
        adding.skip_fake_quants.append(quantizer)
        adding.skip_givers.append(giver.removeprefix(f"{plan.adding}.") if plan.adding else giver)
        made[giver] = quantizer
    return made


def stop_skipping(module: SkippingModule) -> None:
    """Let a module add as it did, in place."""
    del module._modules[SKIPS]
    vars(module).pop("skip_givers")
    resign(module)


def remove_skips(model: nn.Module, givers: Collection[str] | None = None) -> None:
    """Let modules add as they did, in place.

    Args:
        model: The network.
        givers: Paths of the modules to whose outputs nothing rounded is added any more; ``None``: of all.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, SkippingModule):
            continue
        prefix = f"{name}." if name else ""
        gone = [each for each in module.skip_givers if givers is None or f"{prefix}{each}" in givers]
        kept = [
            (each, quantizer)
            for each, quantizer in zip(module.skip_givers, module.skip_fake_quants, strict=True)
            if each not in gone
        ]
        if kept or OUTPUT in module._modules:
            module.skip_givers = [each for each, _ in kept]
            module.skip_fake_quants = nn.ModuleList(quantizer for _, quantizer in kept)
        else:
            stop_skipping(module)
