"""QPR, Quantization Protecting Reparameterization: affine layer behind a merged convolution, exact fold.

Source: arXiv:2402.16121 (abstract); parametrisation and fold are our choice.

Before calibration the affine layer is the identity. During calibration gamma and beta learn faster
than the weights and stretch the convolution's output. `fold_affine` then removes the layer without
changing an integer: ``scale <- |gamma| * scale``, the sign of gamma into the integers (which is why
their grid is symmetric), ``bias <- gamma * bias + beta``.
"""

from __future__ import annotations

import logging
from typing import cast

import torch
from torch import Tensor, nn

from repapq_plugin.core.quant_primitives import EPS, dequantize, quantize
from repapq_plugin.layers import ChannelAffine, QuantizedLayer, output_channels_axis

logger = logging.getLogger(__name__)


def attach_affine(layer: QuantizedLayer) -> None:
    """Put an identity affine layer behind ``layer``; nothing changes until it learns."""
    layer.affine = ChannelAffine(
        layer.out_channels, channels_last=isinstance(layer.layer, nn.Linear), like=layer.weight
    )


def integer_weight(layer: QuantizedLayer) -> Tensor:
    """Return the integer codes of the weight, int32, of the weight's shape."""
    quantizer = layer.weight_fake_quant
    scale, zero_point = quantizer.calculate_qparams()
    axis = quantizer.ch_axis if quantizer.per_channel else None
    return quantize(layer.weight.detach(), scale, zero_point, quantizer.quant_min, quantizer.quant_max, axis)


@torch.no_grad()
def fold_affine(layer: QuantizedLayer) -> None:
    """Fold the affine layer into weight scale and bias, and leave the weights on their grid.

    Per-channel weights: the integers stay (their sign may flip), so the fold is exact. Per-tensor
    weights have one scale for all channels and cannot absorb a gamma each: gamma goes into the real
    weights, which are quantized anew, and a warning says so.
    """
    affine, quantizer = layer.affine, layer.weight_fake_quant
    layer.affine = None
    if quantizer.per_channel:
        codes = integer_weight(layer)
        scale, zero_point = quantizer.calculate_qparams()
        if affine is not None:
            gamma = affine.gamma.detach()
            shape = [1] * codes.dim()
            shape[quantizer.ch_axis] = -1
            codes = codes * torch.sign(gamma).to(codes.dtype).reshape(shape)
            scale = (scale * gamma.abs()).clamp(min=EPS)
        quantizer.set_qparams(scale, zero_point)
        # The stored scale is the exponential of its logarithm; what is multiplied must be that very number.
        layer.weight.copy_(dequantize(codes, quantizer.scale, zero_point, quantizer.ch_axis))
    else:
        if affine is not None and not torch.equal(affine.gamma, torch.ones_like(affine.gamma)):
            logger.warning(
                "A per-tensor weight scheme cannot take the affine layer in exactly: %d channels are "
                "scaled and quantized again.", affine.gamma.numel(),
            )
            axis = output_channels_axis(layer.layer)
            shape = [1] * layer.weight.dim()
            shape[axis] = -1
            scaled = quantizer.quantize_dequantize(layer.weight) * affine.gamma.reshape(shape)
            quantizer.activation_post_process.reset_min_max_vals()
            quantizer.activation_post_process(scaled)
            quantizer.initialise_from_observer()
            layer.weight.copy_(scaled)
        layer.weight.copy_(quantizer.quantize_dequantize(layer.weight))
    if affine is not None:
        bias = layer.bias if layer.bias is not None else torch.zeros_like(affine.beta)
        folded = affine.gamma.detach() * bias + affine.beta.detach()
        cast(nn.Conv2d, layer.layer).bias = nn.Parameter(folded, requires_grad=layer.weight.requires_grad)
