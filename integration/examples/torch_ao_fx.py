"""torch.ao's graph mode: what was learned becomes real integer modules."""

import torch
from torch import nn

from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.hosts import torch_ao

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 10)
).eval()
batches = [torch.randn(8, 3, 16, 16) for _ in range(4)]

result = quantize_model(model, batches, RepAPQConfig.from_preset("w4a4", steps=5))
prepared = torch_ao.prepare_learned(result, (batches[0],), batches)
integer = torch_ao.convert_to_int8(prepared)
print(integer)

with torch.no_grad(), torch_ao.integer_engine("qnnpack"):
    difference = (integer(batches[0]) - result.model(batches[0])).abs().max()
print(f"integers and simulation differ by at most {difference:.4f}")
