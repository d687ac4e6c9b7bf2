"""QPR, Quantization Protecting Reparameterization: affine layer behind a merged convolution, exact fold.

Source: arXiv:2402.16121 (abstract); parametrisation and fold are our choice.

Before calibration the affine layer is the identity. During calibration gamma and beta learn faster
than the weights and stretch the convolution's output. `fold_affine` then removes the layer without
changing an integer: ``scale <- |gamma| * scale``, the sign of gamma into the integers (which is why
their grid is symmetric), ``bias <- gamma * bias + beta``. Activations need not have a zero point for it: the bias
alone takes beta in.

A grid with one scale for all channels, or with scales that are powers of two, cannot take gamma in afterwards. There
the affine layer acts on the real weight during calibration, so that what is learned is what is rounded (our choice).
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from repapq_plugin.core.quant_primitives import dequantize, quantize
from repapq_plugin.errors import MergeError
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize
from repapq_plugin.quantizers.layers import (
    ChannelAffine,
    QuantizedLayer,
    affine_positions,
    bias_of,
    output_channels,
    output_channels_axis,
    weight_of,
)

logger = logging.getLogger(__name__)


def attach_affine(layer: QuantizedLayer, *, inside: bool = False) -> None:
    """Put an identity affine layer behind ``layer``; nothing changes until it learns.

    Args:
        layer: The quantized layer.
        inside: Let it act on the real weight instead, for a grid that cannot take it in exactly.

    Raises:
        MergeError: The layer is a grouped transposed convolution, whose weight has no axis of output
            channels to fold into.
    """
    layer.affine = affine_for(layer, inside=inside)


def affine_for(layer: nn.Module, *, inside: bool = False) -> ChannelAffine:
    """Return the identity affine layer that fits behind a convolution or linear layer, or inside it.

    Raises:
        MergeError: See `attach_affine`.
    """
    if isinstance(layer, nn.ConvTranspose2d) and layer.groups > 1:
        raise MergeError(
            f"A transposed convolution of {layer.groups} groups cannot take an affine layer in; "
            "keep it without one, or float."
        )
    return ChannelAffine(output_channels(layer), affine_positions(layer), like=weight_of(layer), inside=inside)


def folded_scale(affine: ChannelAffine, scale: Tensor) -> Tensor:
    """Return ``|gamma| * scale``, float ``(channels,)``: the weight scale that takes gamma in but for its sign.

    Where gamma is 0 all codes are, and any scale will do: it stays.
    """
    gamma = affine.gamma.detach()
    return torch.where(gamma == 0, scale, scale * gamma.abs())


def folded_bias(affine: ChannelAffine, bias: Tensor | None) -> Tensor:
    """Return ``gamma * bias + beta``, float ``(channels,)``."""
    gamma, beta = affine.gamma.detach(), affine.beta.detach()
    return beta.clone() if bias is None else gamma * bias + beta


def integer_weight(layer: QuantizedLayer) -> Tensor:
    """Return the integer codes of the weight, int32, of the weight's shape: those that are simulated."""
    quantizer = layer.weight_fake_quant
    scale, zero_point = quantizer.calculate_qparams()
    axis = quantizer.ch_axis if quantizer.per_channel else None
    # Taken from what the kernel returns: it multiplies by the inverse scale, which may round the other way.
    simulated = quantizer.quantize_dequantize(weight_of(layer).detach())
    return quantize(simulated, scale, zero_point, quantizer.quant_min, quantizer.quant_max, axis)


@torch.no_grad()
def fold_affine(layer: QuantizedLayer) -> None:
    """Fold the affine layer into weight scale and bias, and leave the weights on their grid.

    Per-channel weights on a symmetric grid: the integers stay (their sign may flip), so the fold is
    exact. So is it for an affine layer inside. Otherwise per-tensor weights have one scale for all channels and
    cannot absorb a gamma each, and a flipped code may fall off an asymmetric grid: there gamma goes into the real
    weights, which are quantized anew, and a warning says so.
    """
    affine, layer.affine = layer.affine, None
    if affine is not None and affine.inside:
        weight_of(layer).copy_(affine.scaled(weight_of(layer), output_channels_axis(layer)))
    _fold_gamma(layer, None if affine is None or affine.inside else affine)
    if affine is not None:
        layer.bias = nn.Parameter(folded_bias(affine, bias_of(layer)), requires_grad=weight_of(layer).requires_grad)


@torch.no_grad()
def round_bias(layer: QuantizedLayer) -> None:
    """Round a bias to multiples of input scale times weight scale, in place: what a runtime adds to integer sums.

    A bias of which a multiple does not fit into 32 bits stays as it is; no runtime rounds it.
    """
    bias, of_input = bias_of(layer), layer.input_fake_quant
    if bias is None or not (of_input.quantizing and layer.weight_fake_quant.quantizing):
        return
    unit = of_input.scale * layer.weight_fake_quant.scale
    codes = torch.round(bias / unit)
    if bool((codes.abs() < 2**31).all()):
        bias.copy_(codes * unit)


def _fold_gamma(layer: QuantizedLayer, affine: ChannelAffine | None) -> None:
    quantizer = layer.weight_fake_quant
    axis = quantizer.ch_axis if quantizer.per_channel else None
    codes = integer_weight(layer)
    scale, zero_point = quantizer.calculate_qparams()
    gamma = None if affine is None else affine.gamma.detach()
    if affine is not None and gamma is not None and not torch.equal(gamma, torch.ones_like(gamma)):
        output_axis = output_channels_axis(layer)
        shape = [1] * codes.dim()
        shape[output_axis] = -1
        scales_freely = axis == output_axis and not quantizer.power_of_two
        flipped = _flipped(codes, gamma.reshape(shape), zero_point, quantizer) if scales_freely else None
        if flipped is None:
            _requantize(layer, gamma.reshape(shape))
            return
        codes, scale = flipped, folded_scale(affine, scale)
    quantizer.set_qparams(scale, zero_point)
    # The stored scale is the exponential of its logarithm; what is multiplied must be that very number.
    weight_of(layer).copy_(dequantize(codes, quantizer.scale, zero_point, axis))


def _flipped(codes: Tensor, gamma: Tensor, zero_point: Tensor, quantizer: LearnableFakeQuantize) -> Tensor | None:
    """Return codes with the sign of ``gamma``, or ``None`` where one would fall off the grid."""
    zero = zero_point.reshape(gamma.shape).to(codes.dtype)
    flipped = zero + (codes - zero) * torch.sign(gamma).to(codes.dtype)
    inside = (flipped >= quantizer.quant_min) & (flipped <= quantizer.quant_max)
    return flipped if bool(inside.all()) else None


def _requantize(layer: QuantizedLayer, gamma: Tensor) -> None:
    quantizer = layer.weight_fake_quant
    logger.warning(
        "The weight grid (%s, %d to %d) cannot take the affine layer in exactly: %d channels are scaled and "
        "quantized again.",
        quantizer.qscheme,
        quantizer.quant_min,
        quantizer.quant_max,
        gamma.numel(),
    )
    scaled = quantizer.quantize_dequantize(weight_of(layer)) * gamma
    quantizer.activation_post_process.reset_min_max_vals()
    quantizer.activation_post_process(scaled)
    quantizer.initialise_from_observer()
    weight_of(layer).copy_(quantizer.quantize_dequantize(scaled))
