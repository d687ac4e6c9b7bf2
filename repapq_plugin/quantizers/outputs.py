"""Outputs of layers that something else reads than one group of quantized layers, rounded where a target wants it.

A runtime whose integer kernels write integers computes a layer in them only if what it gives is rounded, at once or
behind an activation that the kernel computes as well. Where quantized layers read it, their quantizers do that. Where
pooling, an addition or the user reads it, it gets a quantizer, behind the module that gives it: the layer itself, the
activation, or what holds both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.hooks import Hooks
from repapq_plugin.core.modules import become, may_become
from repapq_plugin.core.tensor_notes import TensorNotes
from repapq_plugin.core.tensors import first_tensor, tensors_of, version_of
from repapq_plugin.core.watch import MAKERS_OF_OTHERS, FunctionWatch
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize
from repapq_plugin.quantizers.layers import OUTPUT, QuantizedLayer, RoundedLayer, take_role
from repapq_plugin.quantizers.plan import LayerPlan, OutputPlan, input_quantizer
from repapq_plugin.quantizers.skips import SkippingModule, skipping, stop_skipping
from repapq_plugin.targets.target import CONTAINER_BITS

JOINED = ("relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp", "clamp_")
"""Functions that an integer kernel computes behind its sums."""

MOVING = (
    *("cat", "concat", "concatenate", "max_pool2d", "flatten", "reshape", "view", "permute", "transpose"),
    *("squeeze", "unsqueeze"),
)
"""Functions that give nothing but values of their arguments: rounding before or after them is the same."""

OPERATORS: Mapping[type[nn.Module], str] = {
    nn.Conv1d: "Conv",
    nn.Conv2d: "Conv",
    nn.Conv3d: "Conv",
    nn.ConvTranspose2d: "ConvTranspose",
    nn.Linear: "Gemm",
}
"""ONNX operators of the layers that are quantized."""


@dataclass(eq=False)
class _Value:
    """A tensor between two changes: what reads it, and which modules return it, the innermost one first."""

    groups: set[int | None] = field(default_factory=set)
    others: int = 0
    joined: list[_Value] = field(default_factory=list)
    moved: list[_Value] = field(default_factory=list)
    givers: list[str] = field(default_factory=list)

    def behind_activation(self) -> _Value:
        """Return what a kernel writes: this, or what an activation makes of it that alone reads it."""
        alone = len(self.joined) == 1 and not (self.groups or self.others or self.moved)
        return self.joined[0].behind_activation() if alone else self

    def readers(self) -> tuple[set[int | None], bool]:
        """Return the groups of layers that read it in the end, and whether something else does."""
        groups, others = set(self.groups), bool(self.others or self.joined)
        for value in self.moved:
            further, more = value.readers()
            groups, others = groups | further, others or more
        return groups, others

    def needs_rounding(self) -> bool:
        """Whether no single quantizer of layers rounds all that reads it."""
        groups, others = self.readers()
        return others or len(groups) > 1

    def group(self) -> int | None:
        """Return the group of layers whose quantizer rounds it, those that read the very tensor first."""
        for groups in (self.groups, self.readers()[0]):
            if groups:
                return next(iter(groups)) if len(groups) == 1 else None
        return None


class _Readers(FunctionWatch):
    """Follows the outputs of layers through one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.values: TensorNotes[_Value] = TensorNotes()
        self.inside = 0
        """How many planned layers run at this moment; what they compute is their own."""
        self.kept: list[Tensor] = []  # so that identities stay unique

    def put(self, tensor: Tensor) -> _Value:
        """Return a new value that a tensor has from now on."""
        value = _Value()
        self.values.put(tensor, value)
        self.kept.append(tensor)
        return value

    def before(self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        """Return the arguments and how often each was changed."""
        return [] if self.inside else [(each, version_of(each)) for each in tensors_of([args, kwargs])]

    def after(
        self,
        name: str,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        result: object,
        note: list[tuple[Tensor, int]],
    ) -> None:
        """Note who has read what."""
        results = tensors_of(result)
        read = []
        for tensor, version in note:
            value, changed = self.values.get(tensor), version_of(tensor) != version
            passed_on = not changed and any(each is tensor for each in results)  # an idle dropout
            if value is not None and name not in MAKERS_OF_OTHERS and not passed_on:
                read.append(value)
            if changed:
                self.values.forget(tensor)
        if not read:
            return
        nearest = name == "interpolate" and kwargs.get("mode", "nearest") == "nearest"
        if len(results) == 1 and (name in JOINED or name in MOVING or nearest):
            made = self.put(results[0])
            for value in read:
                (value.joined if name in JOINED else value.moved).append(made)
        else:
            for value in read:
                value.others += 1


def find_outputs(
    model: nn.Module, run: Callable[[], object], plans: Mapping[str, LayerPlan], operators: Collection[str]
) -> dict[str, OutputPlan]:
    """Return how outputs of layers are quantized, by the path of the module that gives them.

    One that quantized layers read too shares their quantizer; others have as many bits as what carries them. An output
    that no module gives by itself, as one behind an activation in the middle of a forward, is left as it is.

    Args:
        model: The merged float network.
        run: Makes one forward pass of it.
        plans: Layers that are quantized, by module path.
        operators: ONNX operators of the layers whose outputs are rounded.
    """
    watch = _Readers()
    modules = dict(model.named_modules())
    made: dict[str, list[_Value]] = {}
    returned: dict[str, list[_Value | None]] = {}

    def starts(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            value = watch.values.get(first_tensor(args, kwargs))
            if value is not None:
                value.groups.add(plans[name].input_group)
            watch.inside += 1

        return hook

    def ends(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: object, output: object) -> None:
            if name in plans:
                watch.inside -= 1
                if isinstance(output, Tensor):
                    made.setdefault(name, []).append(watch.put(output))
            value = watch.values.get(output)
            returned.setdefault(name, []).append(value)
            if value is not None and name not in value.givers:
                value.givers.append(name)

        return hook

    with Hooks() as hooks, torch.no_grad():
        for name, module in modules.items():
            if name in plans:
                hooks.before(module, starts(name), with_kwargs=True)
            hooks.after(module, ends(name))
        with watch:
            results = tensors_of(run())
    for value in filter(None, map(watch.values.get, results)):
        value.others += 1
    asked = {name for name in made if any(isinstance(modules[name], kind) for kind in _kinds(operators))}
    outputs = {id(value.behind_activation()) for name in asked for value in made[name]}
    found: dict[str, list[tuple[str, int | None]]] = {}
    for name in asked:
        for value in (each.behind_activation() for each in made[name]):
            giver = next((each for each in value.givers if _gives(returned[each], outputs, modules[each])), None)
            if giver is not None and value.needs_rounding():
                found.setdefault(giver, []).append((name, value.group()))
    return {giver: _plan(pairs, plans) for giver, pairs in sorted(found.items())}


def _kinds(operators: Collection[str]) -> list[type[nn.Module]]:
    return [kind for kind, operator in OPERATORS.items() if operator in operators]


def _gives(returned: list[_Value | None], outputs: Collection[int], module: nn.Module) -> bool:
    """Whether a module returns nothing but outputs that need rounding."""
    wanted = all(value is not None and id(value) in outputs and value.needs_rounding() for value in returned)
    return wanted and may_become(module)


def _plan(pairs: list[tuple[str, int | None]], plans: Mapping[str, LayerPlan]) -> OutputPlan:
    groups = {group for _, group in pairs}
    group = groups.pop() if len(groups) == 1 else None
    shared = next((plan.activation_bits for plan in plans.values() if plan.input_group == group), CONTAINER_BITS)
    bits = CONTAINER_BITS if group is None else shared
    return OutputPlan(tuple(dict.fromkeys(name for name, _ in pairs)), bits, group)


class RoundedModule(SkippingModule):
    """The role of a module whose output is rounded; it may round summands as well. Made by `insert_outputs`."""

    output_fake_quant: LearnableFakeQuantize

    def forward(self, *args: object, **kwargs: object) -> object:
        """Run the module's own forward and round the tensor that it returns."""
        return self.output_fake_quant(super().forward(*args, **kwargs))


def insert_outputs(
    model: nn.Module,
    outputs: Mapping[str, OutputPlan],
    plans: Mapping[str, LayerPlan],
    layers: Mapping[str, QuantizedLayer],
    config: RepAPQConfig,
) -> dict[str, LearnableFakeQuantize]:
    """Let modules round what they give, in place.

    Args:
        model: A network whose planned layers are quantized.
        outputs: From `find_outputs`.
        plans: How each layer is quantized, by module path.
        layers: Those layers.
        config: Says the grids.

    Returns:
        The quantizers by the path of the module; shared ones are those of a layer.
    """
    by_group = {plans[name].input_group: layer.input_fake_quant for name, layer in layers.items()}
    inserted: dict[str, LearnableFakeQuantize] = {}
    for giver, plan in outputs.items():
        module = model.get_submodule(giver)
        quantizer = None if plan.input_group is None else by_group.get(plan.input_group)
        if quantizer is None:
            quantizer = input_quantizer(plan.bits, config)
            quantizer.enable_observer(False)
            quantizer.to(layers[plan.layers[0]].input_fake_quant.log_scale.device).eval().requires_grad_(False)
        if isinstance(module, QuantizedLayer):
            take_role(module, RoundedLayer).output_fake_quant = quantizer
        else:
            become(skipping(module), RoundedModule).output_fake_quant = quantizer
        inserted[giver] = quantizer
    return inserted


def remove_outputs(model: nn.Module, givers: Collection[str] | None = None) -> None:
    """Let modules give what they did, in place.

    Args:
        model: The network.
        givers: Paths of the modules whose outputs are rounded no more; ``None``: of all.
    """
    for name, module in list(model.named_modules()):
        if (givers is not None and name not in givers) or OUTPUT not in module._modules:
            continue
        if isinstance(module, RoundedLayer):
            del module._modules[OUTPUT]
            take_role(module, QuantizedLayer)
        elif isinstance(module, RoundedModule):
            del module._modules[OUTPUT]
            adding = become(module, SkippingModule)
            if not adding.skip_givers:
                stop_skipping(adding)
