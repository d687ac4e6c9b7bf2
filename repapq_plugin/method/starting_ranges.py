"""Starting ranges of all activations, in one pass over the calibration data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.core.losses import mae_loss
from repapq_plugin.core.quant_primitives import fake_quantize
from repapq_plugin.errors import CalibrationError
from repapq_plugin.observers import OBSERVERS
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize
from repapq_plugin.quantizers.layers import QuantizedLayer, apply_layer
from repapq_plugin.quantizers.trace import hooked

AUTO_CANDIDATES = ("min_max", "mse", "mae")
AUTO_BATCHES = 2
"""Batches on which ``auto`` compares its candidates (our choice: two suffice for a per-tensor scale)."""


@torch.no_grad()
def set_starting_ranges(
    layers: Mapping[str, QuantizedLayer],
    run: Callable[[Any], Any],
    batches: Sequence[Any],
    config: RepAPQConfig,
    advance: Callable[[], None],
) -> None:
    """Observe the float network on every batch and give each input quantizer its scale.

    Args:
        layers: Quantized layers by module path; afterwards they quantize and no longer observe.
        run: Makes a forward pass of the network that holds them.
        batches: Calibration batches.
        config: Names the observer.
        advance: Called after each batch.

    Raises:
        CalibrationError: A layer's input holds NaN or Inf; the message names the layer.
    """
    auto = config.activation_observer == "auto"
    chooser = _RangeChooser(layers) if auto else None
    for layer in layers.values():
        layer.weight_fake_quant.enable_fake_quant(False)
        layer.input_fake_quant.enable_fake_quant(False)
        layer.input_fake_quant.enable_observer(False)
    with hooked([layer.register_forward_pre_hook(_observer_of(name, chooser)) for name, layer in layers.items()]):
        for batch in batches:
            run(batch)
            advance()
    if not any(layer.input_fake_quant.activation_post_process.min_val.numel() for layer in layers.values()):
        raise CalibrationError(
            f"No layer read a single value in {len(batches)} calibration batches; give batches that hold images."
        )
    for layer in layers.values():
        if layer.input_fake_quant.activation_post_process.min_val.numel():
            layer.input_fake_quant.initialise_from_observer()
    if chooser is not None:
        chooser.choose(run, batches[:AUTO_BATCHES])
    for layer in layers.values():
        layer.weight_fake_quant.enable_fake_quant(True)
        layer.input_fake_quant.enable_fake_quant(True)


def _observer_of(name: str, chooser: _RangeChooser | None) -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
        quantizer = layer.input_fake_quant
        try:
            if isinstance(quantizer, LearnableFakeQuantize):
                quantizer.activation_post_process(args[0])
                if chooser is not None:
                    chooser.observe(quantizer, args[0])
        except CalibrationError as error:
            raise CalibrationError(
                f"The input of {name!r} is not finite: {error} Check the checkpoint and the calibration data."
            ) from error

    return hook


class _RangeChooser:
    """``auto``: for every quantizer, the range that disturbs the outputs of its layers least."""

    def __init__(self, layers: Mapping[str, QuantizedLayer]) -> None:
        self.layers = layers
        self.observers: dict[LearnableFakeQuantize, dict[str, Any]] = {}
        for layer in layers.values():
            quantizer = layer.input_fake_quant
            watched = quantizer.activation_post_process
            self.observers.setdefault(
                quantizer,
                {
                    name: OBSERVERS[name](
                        dtype=watched.dtype,
                        qscheme=watched.qscheme,
                        quant_min=watched.quant_min,
                        quant_max=watched.quant_max,
                    ).to(layer.weight.device)
                    for name in AUTO_CANDIDATES
                },
            )

    def observe(self, quantizer: LearnableFakeQuantize, x: Tensor) -> None:
        for observer in self.observers[quantizer].values():
            observer(x)

    def choose(self, run: Callable[[Any], Any], batches: Sequence[Any]) -> None:
        ranges = {
            quantizer: {name: observer.calculate_qparams() for name, observer in observers.items()}
            for quantizer, observers in self.observers.items()
        }
        errors = {quantizer: dict.fromkeys(AUTO_CANDIDATES, 0.0) for quantizer in ranges}

        def compare(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if not isinstance(layer, QuantizedLayer):
                return
            quantizer = layer.input_fake_quant
            for name, (scale, zero_point) in ranges[quantizer].items():
                hat = fake_quantize(args[0], scale, zero_point, quantizer.quant_min, quantizer.quant_max)
                error = mae_loss(apply_layer(layer.layer, hat, layer.weight), output)
                errors[quantizer][name] += float(error)

        with hooked([layer.register_forward_hook(compare) for layer in self.layers.values()]):
            for batch in batches:
                run(batch)
        for quantizer, by_name in errors.items():
            best = min(by_name, key=lambda name: by_name[name])
            quantizer.set_qparams(*ranges[quantizer][best])
