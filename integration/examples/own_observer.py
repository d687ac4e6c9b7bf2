"""An observer of one's own: it says how a range is found, and stands wherever torch.ao takes an observer."""

import torch
from torch import nn
from torch.ao.quantization import QConfig, QConfigMapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx

from repapq_plugin import LearnableFakeQuantize, PerChannelLearnableFakeQuantize
from repapq_plugin.observers import PerChannelMSEObserver, RangeObserver


class DeviationObserver(RangeObserver):
    """Four standard deviations to each side of the mean, or what was seen if that is less."""

    def observe(self, x):
        mean, reach = x.mean(), 4 * x.std()
        self._widen(torch.maximum(x.min(), mean - reach), torch.minimum(x.max(), mean + reach))


activation = LearnableFakeQuantize.with_args(
    observer=DeviationObserver, dtype=torch.quint8, qscheme=torch.per_tensor_affine, quant_min=0, quant_max=15
)
weight = PerChannelLearnableFakeQuantize.with_args(
    observer=PerChannelMSEObserver, dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=-7, quant_max=7
)

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()).train()
images = torch.randn(8, 3, 16, 16)
prepared = prepare_qat_fx(model, QConfigMapping().set_global(QConfig(activation, weight)), (images,))
prepared(images)
for name, module in prepared.named_modules():
    if isinstance(module, DeviationObserver):
        print(f"{name}: {float(module.min_val):.3f} to {float(module.max_val):.3f}")
