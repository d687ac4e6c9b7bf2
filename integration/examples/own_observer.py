"""An observer of one's own: it says how a range is found, and the configuration names it."""

import torch
from torch import nn

from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.observers import HistogramRangeObserver, register_observer


@register_observer("deviation")
class DeviationObserver(HistogramRangeObserver):
    """Four standard deviations to each side of the mean, or what was seen if that is less."""

    def find_range(self):
        values, counts = self.points()  # all values seen so far, and how often
        mean = (values * counts).sum() / counts.sum()
        reach = 4 * ((values - mean).square() * counts).sum().div(counts.sum()).sqrt()
        low, high = (mean - reach).float(), (mean + reach).float()
        return torch.maximum(low, self.min_val), torch.minimum(high, self.max_val)


torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
batches = [torch.randn(8, 3, 16, 16) for _ in range(4)]

config = RepAPQConfig.from_preset("w4a4", activation_observer="deviation", steps=5)
result = quantize_model(model, batches, config)
print(result.config.scheme)
# The class also stands in a QConfig of torch.ao: QConfig(activation=DeviationObserver.with_args(...), weight=...).
for name, layer in result.plan.layers.items():
    print(f"{name}: {layer}")
