"""From nncf.quantize to RepAPQ: one import changes, and what comes back goes to OpenVINO as before."""

import nncf
import openvino
import torch
from torch import nn

from repapq_plugin import RepAPQConfig
from repapq_plugin.hosts.nncf import quantize  # was: from nncf import quantize


class Network(nn.Module):
    """NNCF wants a class of its own around the layers: it cannot follow a bare nn.Sequential."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))

    def forward(self, x):
        return self.layers(x)


torch.manual_seed(0)
model = Network().eval()
images = [torch.randn(1, 3, 16, 16) for _ in range(16)]

quantized = quantize(
    model,
    nncf.Dataset(images),
    target_device=nncf.TargetDevice.CPU,  # every argument of nncf.quantize
    repapq=RepAPQConfig.from_preset("w8a8", steps=5, reduce_range=True),  # and one more
)

compiled = openvino.compile_model(openvino.convert_model(quantized, example_input=images[0]), "CPU")
served = torch.from_numpy(compiled(images[0].numpy())[0])
print(f"OpenVINO and torch differ by at most {(served - quantized(images[0])).abs().max():.5f}")
