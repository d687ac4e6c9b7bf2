"""`RepAPQQuantizer`: where pt2e puts quantizers, and of how many bits."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.quant_primitives import activation_bounds, weight_bounds
from repapq_plugin.hosts.pt2e.fake_quantize import LearnableFakeQuantize, PerChannelLearnableFakeQuantize
from repapq_plugin.hosts.pt2e.graph import ends, groups, layer_nodes, module_path, output_axis
from repapq_plugin.hosts.pt2e.observers import OBSERVERS

ANNOTATION = "quantization_annotation"
"""Key of a node's ``meta`` that pt2e reads."""


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
        self.config = RepAPQConfig.from_preset(config) if isinstance(config, str) else config
        self.is_qat = is_qat

    def annotate(self, model: GraphModule) -> GraphModule:
        """Say for every layer of an exported graph how its input and its weight are quantized."""
        first, last = ends(model)
        specs: dict[tuple[int, int, int], tuple[QuantizationSpec, QuantizationSpec]] = {}
        for node in layer_nodes(model):
            bits = self._bits(node, node in first or node in last)
            if bits is None or ANNOTATION in node.meta:
                continue
            key = (*bits, output_axis(node))
            activation, weight = specs.setdefault(key, quantization_specs(self.config, *key, is_qat=self.is_qat))
            node.meta[ANNOTATION] = QuantizationAnnotation(
                input_qspec_map={node.args[0]: activation, node.args[1]: weight}, _annotated=True
            )
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to object to: what is not annotated stays float."""

    def _bits(self, node: Node, at_an_end: bool) -> tuple[int, int] | None:
        config, name = self.config, module_path(node)
        if any(fnmatchcase(name, pattern) or fnmatchcase(name, pattern + ".*") for pattern in config.keep_float):
            return None
        if output_axis(node) == 1 and groups(node) > 1:
            return None  # its weight has no axis of output channels
        bits = (config.weight_bits, config.activation_bits)
        if config.first_last_bits is not None and at_an_end:
            bits = (config.first_last_bits, config.first_last_bits)
        for pattern, special in config.layer_bits.items():
            if fnmatchcase(name, pattern):
                bits = special
        return bits


def quantization_specs(
    config: RepAPQConfig, weight_bits: int, activation_bits: int, ch_axis: int = 0, *, is_qat: bool = False
) -> tuple[QuantizationSpec, QuantizationSpec]:
    """Return pt2e's specifications of an activation and of a weight, with our classes.

    Args:
        config: Names the observers.
        weight_bits: Bits of the weight, per channel, symmetric, narrow range.
        activation_bits: Bits of the activation, per tensor, affine, unsigned.
        ch_axis: Axis of the weight's output channels.
        is_qat: See `RepAPQQuantizer`.
    """
    name = "mse" if config.activation_observer == "auto" else config.activation_observer
    extra: dict[str, Any] = {"percentile": config.percentile} if name == "percentile" else {}
    observer, weight_observer = OBSERVERS[name], OBSERVERS[f"per_channel_{config.weight_observer}"]
    if is_qat:
        activation = LearnableFakeQuantize.with_args(observer=partial(observer, **extra))
        weight = PerChannelLearnableFakeQuantize.with_args(observer=weight_observer)
    else:
        activation, weight = observer.with_args(**extra), weight_observer.with_args()
    bounds = weight_bounds(config.weight_bits_used(weight_bits))
    return (
        QuantizationSpec(torch.uint8, activation, *activation_bounds(activation_bits), torch.per_tensor_affine),
        QuantizationSpec(torch.int8, weight, *bounds, torch.per_channel_symmetric, ch_axis),
    )


def x86_inductor_quantizer(config: RepAPQConfig | str = "w8a8", *, is_qat: bool = False) -> Quantizer:
    """Return torchao's ``X86InductorQuantizer`` with our classes as its global configuration.

    It knows one width for the whole network, and also quantizes poolings and concatenations between
    integer layers.
    """
    from torchao.quantization.pt2e.quantizer.utils import QuantizationConfig
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

    config = RepAPQConfig.from_preset(config) if isinstance(config, str) else config
    activation, weight = quantization_specs(config, config.weight_bits, config.activation_bits, is_qat=is_qat)
    return X86InductorQuantizer().set_global(QuantizationConfig(activation, activation, weight, None, is_qat))
