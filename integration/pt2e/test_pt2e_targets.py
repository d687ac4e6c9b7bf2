"""pt2e carries the grid of every target, and its quantizer says the target's types."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.errors import ConfigError
from repapq_plugin.hosts.pt2e import prepare_learned
from repapq_plugin.hosts.pt2e.quantizer import quantization_specs
from repapq_plugin.targets import TARGETS, Target
from tests.support.networks import Chain, batches, settle

PER_TENSOR = Target("per tensor", weights_per_channel=False)
POWERS = Target("powers", signed_activations=True, symmetric_activations=True, power_of_two_scales=True)


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    torch.manual_seed(0)
    return batches(2)


@pytest.mark.parametrize("bits", ["w8a8", "w4a6"])
@pytest.mark.parametrize(
    "target", [TARGETS["executorch"], TARGETS["tensorrt"], PER_TENSOR, POWERS], ids=lambda target: target.name
)
def test_a_converted_graph_computes_what_is_simulated(data: list[Tensor], target: Target, bits: str) -> None:
    torch.manual_seed(0)
    result = quantize_model(settle(Chain()), data, RepAPQConfig.from_preset(bits, target=target, steps=2))
    graph = convert_pt2e(prepare_learned(result, (data[0],)))
    with torch.no_grad():
        assert torch.equal(graph(data[0]), result.model(data[0]))
    wanted = (-128, 127, torch.int8) if target.signed_activations else (0, 255, torch.uint8)
    rounds = [node for node in graph.graph.nodes if "quantize_per_tensor" in str(node.target)]
    activations = [node for node in rounds if node.args[0].op != "get_attr"]
    assert activations and all(node.args[3:6] == wanted for node in activations)


@pytest.mark.parametrize("is_qat", [False, True])
def test_specifications_say_the_types_and_schemes_of_the_target(is_qat: bool) -> None:
    activation, weight = quantization_specs(RepAPQConfig(target="tensorrt"), 8, 6, is_qat=is_qat)
    assert (activation.dtype, activation.quant_min, activation.quant_max) == (torch.int8, -32, 31)
    assert activation.qscheme == torch.per_tensor_symmetric and weight.qscheme == torch.per_channel_symmetric
    activation, weight = quantization_specs(RepAPQConfig(target="executorch"), 8, 8, is_qat=is_qat)
    assert (activation.dtype, activation.qscheme) == (torch.int8, torch.per_tensor_affine)
    activation, weight = quantization_specs(RepAPQConfig(target=PER_TENSOR), 8, 8, is_qat=is_qat)
    assert (activation.dtype, weight.qscheme) == (torch.uint8, torch.per_tensor_symmetric)


def test_observers_find_no_powers_of_two() -> None:
    with pytest.raises(ConfigError, match="target='powers' is not allowed with is_qat=False"):
        quantization_specs(RepAPQConfig(target=POWERS), 8, 8)
    activation, _ = quantization_specs(RepAPQConfig(target=POWERS), 8, 8, is_qat=True)
    assert activation.observer_or_fake_quant_ctr(dtype=torch.int8).power_of_two
