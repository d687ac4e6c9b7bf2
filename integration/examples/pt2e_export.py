"""torchao's pt2e: the learned values go into an exported graph, which convert_pt2e turns into integers."""

import torch
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.hosts import pt2e

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 10)
).eval()
batches = [torch.randn(8, 3, 16, 16) for _ in range(4)]

result = quantize_model(model, batches, RepAPQConfig.from_preset("w8a8", steps=5))
prepared = pt2e.prepare_learned(result, (batches[0],))
converted = convert_pt2e(prepared)  # torch.compile it with torch._inductor.config.freezing = True

weights = [name for name, tensor in converted.state_dict().items() if tensor.dtype is torch.int8]
print("integer weights:", weights)
difference = (converted(batches[0]) - result.model(batches[0])).abs().max()
print(f"converted graph and simulation differ by at most {difference:.6f}")
