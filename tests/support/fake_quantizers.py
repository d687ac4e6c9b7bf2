"""Fake quantizers with scales given by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize, PerChannelLearnableFakeQuantize


def ready(quantizer: LearnableFakeQuantize, scale: Tensor, zero_point: Tensor) -> LearnableFakeQuantize:
    """A quantizer as calibration uses it: it no longer observes."""
    quantizer.enable_observer(False)
    quantizer.set_qparams(scale, zero_point)
    return quantizer


def per_tensor(scale: float = 0.25, zero_point: int = 3, bits: int = 4) -> LearnableFakeQuantize:
    quantizer = LearnableFakeQuantize(quant_min=0, quant_max=2**bits - 1)
    return ready(quantizer, torch.tensor([scale]), torch.tensor([zero_point]))


def per_channel(channels: int, ch_axis: int, bits: int = 4) -> LearnableFakeQuantize:
    bound = 2 ** (bits - 1) - 1
    quantizer = PerChannelLearnableFakeQuantize(quant_min=-bound, quant_max=bound, ch_axis=ch_axis)
    return ready(quantizer, torch.rand(channels) * 0.3 + 0.05, torch.zeros(channels, dtype=torch.int64))
