"""`RepAPQQuantizer`: where pt2e puts quantizers, and of how many bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import QuantizationSpec, Quantizer

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.quant_primitives import activation_bounds, weight_bounds
from repapq_plugin.errors import ConfigError
from repapq_plugin.hosts.pt2e._compat import annotate, is_annotated, module_path, quantizer_of_inductor
from repapq_plugin.hosts.pt2e.fake_quantize import LearnableFakeQuantize, PerChannelLearnableFakeQuantize
from repapq_plugin.hosts.pt2e.graph import ends, groups, layer_nodes, output_axis
from repapq_plugin.hosts.pt2e.observers import OBSERVERS, TorchaoObserver
from repapq_plugin.policy import (
    bits_of,
    check_patterns,
    is_kept_float,
    lone_activation_observer,
    observer_arguments,
    repapq_config,
)


class RepAPQQuantizer(Quantizer):  # type: ignore[misc]
    """Quantizes inputs and weights of convolutions, transposed convolutions and linear layers.

    The bits of each layer follow the configuration as in `quantize_model`: ``first_last_bits``,
    ``layer_bits`` and ``keep_float`` count, the latter two by module paths of the exported network.
    Nodes that another quantizer has annotated are left to it, so it can be composed with others.

    Args:
        config: Bits and observers, or a preset's name. ``activation_observer="auto"`` means MSE here.
        is_qat: Give fake quantizers with a learnable scale; else observers.

    Raises:
        ConfigError: The preset is unknown.
    """

    def __init__(self, config: RepAPQConfig | str = "w8a8", *, is_qat: bool = False) -> None:
        super().__init__()
        self.config = repapq_config(config)
        self.is_qat = is_qat

    def annotate(self, model: GraphModule) -> GraphModule:
        """Say for every layer of an exported graph how its input and its weight are quantized.

        Raises:
            ConfigError: A pattern of ``keep_float`` or ``layer_bits`` matches no layer of the graph.
        """
        self._check_patterns(model)
        first, last = ends(model)
        specs: dict[tuple[int, int, int], tuple[QuantizationSpec, QuantizationSpec]] = {}
        for node in layer_nodes(model):
            if is_annotated(node) or self._stays_float(node):
                continue
            bits = bits_of(module_path(node), node in first or node in last, self.config)
            key = (*bits, output_axis(node))
            activation, weight = specs.setdefault(key, quantization_specs(self.config, *key, is_qat=self.is_qat))
            annotate(node, {cast(Node, node.args[0]): activation, cast(Node, node.args[1]): weight})
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to object to: what is not annotated stays float."""

    def _stays_float(self, node: Node) -> bool:
        no_channel_axis = output_axis(node) == 1 and groups(node) > 1  # the case of `policy.NO_CHANNEL_AXIS`
        return no_channel_axis or is_kept_float(module_path(node), self.config)

    def _check_patterns(self, model: GraphModule) -> None:
        layers = {module_path(node) for node in layer_nodes(model)}
        around = {name[:end] for name in layers for end, letter in enumerate(name) if letter == "."}
        check_patterns(self.config.keep_float, layers | around, "keep_float")
        check_patterns(self.config.layer_bits, layers, "layer_bits")


def quantization_specs(
    config: RepAPQConfig, weight_bits: int, activation_bits: int, ch_axis: int = 0, *, is_qat: bool = False
) -> tuple[QuantizationSpec, QuantizationSpec]:
    """Return pt2e's specifications of an activation and of a weight, with our classes.

    Args:
        config: Names the observers and the target: signed or not, symmetric or affine, per channel or per tensor.
        weight_bits: Bits of the weight, symmetric, narrow range.
        activation_bits: Bits of the activation, per tensor.
        ch_axis: Axis of the weight's output channels.
        is_qat: See `RepAPQQuantizer`.

    Raises:
        ConfigError: The target wants scales that are powers of two, and ``is_qat`` is false.
    """
    target, name = config.runs_on, lone_activation_observer(config)
    extra = observer_arguments(name, config)
    observer: Callable[..., TorchaoObserver] = OBSERVERS[name]
    per_channel = target.weights_per_channel
    weight_observer = OBSERVERS[f"per_channel_{config.weight_observer}" if per_channel else config.weight_observer]
    if is_qat:
        powers = target.power_of_two_scales
        activation = LearnableFakeQuantize.with_args(observer=partial(observer, **extra), power_of_two=powers)
        kind = PerChannelLearnableFakeQuantize if per_channel else LearnableFakeQuantize
        weight = kind.with_args(observer=weight_observer, power_of_two=powers)
    elif target.power_of_two_scales:
        raise ConfigError(
            f"target={target.name!r} is not allowed with is_qat=False: observers find no scales that are powers of "
            "two; give is_qat=True, or carry over what quantize_model learned."
        )
    else:
        activation, weight = OBSERVERS[name].with_args(**extra), weight_observer.with_args()
    activation_grid = activation_bounds(activation_bits, signed=target.signed_activations)
    bounds = weight_bounds(config.weight_bits_used(weight_bits))
    return (
        QuantizationSpec(
            torch.int8 if target.signed_activations else torch.uint8,
            activation,
            *activation_grid,
            torch.per_tensor_symmetric if target.symmetric_activations else torch.per_tensor_affine,
        ),
        QuantizationSpec(torch.int8, weight, *bounds, torch.per_channel_symmetric, ch_axis)
        if per_channel
        else QuantizationSpec(torch.int8, weight, *bounds, torch.per_tensor_symmetric),
    )


def x86_inductor_quantizer(config: RepAPQConfig | str = "w8a8", *, is_qat: bool = False) -> Quantizer:
    """Return torchao's ``X86InductorQuantizer`` with our classes as its global configuration.

    It knows one width for the whole network, and also quantizes poolings and concatenations between
    integer layers.
    """
    config = repapq_config(config)
    activation, weight = quantization_specs(config, config.weight_bits, config.activation_bits, is_qat=is_qat)
    return quantizer_of_inductor(activation, weight, is_qat=is_qat)
