"""torch.ao's integers are those of the default target; others are refused before any work is done."""

from __future__ import annotations

import pytest
import torch

from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.errors import ConfigError, HostError
from repapq_plugin.hosts.torch_ao import prepare_learned, repapq_qconfig
from repapq_plugin.hosts.torch_ao.eager import prepare_learned_eager
from repapq_plugin.hosts.torch_ao.hosted import quantize_network
from tests.support.networks import Chain, batches, settle


@pytest.mark.parametrize("target", ["tensorrt", "executorch", "qnn"])
def test_another_target_is_refused(target: str) -> None:
    config = RepAPQConfig(target=target, steps=0)
    with pytest.raises(ConfigError, match=f"target='{target}' is not allowed with torch.ao.*'generic'"):
        repapq_qconfig(config)
    with pytest.raises(ConfigError, match=f"target='{target}' is not allowed with torch.ao"):
        quantize_network(settle(Chain()), batches(1), config)


def test_a_network_with_signed_inputs_is_refused_by_layer() -> None:
    torch.manual_seed(0)
    data = batches(1)
    result = quantize_model(settle(Chain()), data, RepAPQConfig(target="tensorrt", steps=0))
    message = r"'stem\.conv' reads signed integers.*pt2e"
    with pytest.raises(HostError, match=message):
        prepare_learned(result, (data[0],), data)
    with pytest.raises(HostError, match=message):
        prepare_learned_eager(result, data)
