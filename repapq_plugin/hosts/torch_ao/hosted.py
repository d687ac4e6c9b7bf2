"""torch.ao behind the call that every host has: calibrate a network of images, and run it in integers."""

from __future__ import annotations

from repapq_plugin.hosts.hosted import quantizing_on
from repapq_plugin.hosts.torch_ao.backend import TorchAOBackend

quantize_network = quantizing_on(TorchAOBackend)
"""Calibrate a network and convert it to torch.ao's integer modules (see `repapq_plugin.hosts.hosted.Quantize`).

The option ``backend`` says which of torch's engines of integer kernels it is for.
"""
