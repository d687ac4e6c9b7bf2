"""`RepAPQQuantizer` gives each layer the bits that `quantize_model` gives it, and refuses what matches nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from integration.torch_ao.shared import POLICIES, QUICK, policy
from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.errors import ConfigError
from repapq_plugin.export.deploy import without_quantizers
from repapq_plugin.hosts import pt2e
from repapq_plugin.hosts.pt2e._compat import module_path
from repapq_plugin.hosts.pt2e.graph import layer_nodes, quantizer_at
from repapq_plugin.hosts.pt2e.observers import TorchaoObserver
from tests.support.networks import Chain, Pyramid, batches, settle


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    torch.manual_seed(1)
    return batches(2)


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"Chain": settle(Chain()), "Pyramid": settle(Pyramid())}


def exported(network: nn.Module, data: list[Tensor]) -> GraphModule:
    return torch.export.export(copy.deepcopy(network), (data[0],)).module()


def bits_of_layers(prepared: GraphModule) -> dict[str, tuple[int, int]]:
    """Bits of the weight and the input of each layer that pt2e prepared, by its module path."""
    found = {}
    for node in layer_nodes(prepared):
        source, weight = (quantizer_at(prepared, node.args[position]) for position in (0, 1))
        if isinstance(source, TorchaoObserver) and isinstance(weight, TorchaoObserver):
            found[module_path(node)] = (weight.quant_max.bit_length() + 1, source.quant_max.bit_length())
    return found


@pytest.mark.parametrize("name", POLICIES)
def test_each_layer_has_the_bits_that_quantize_model_gives_it(
    name: str, networks: dict[str, nn.Module], data: list[Tensor]
) -> None:
    result = quantize_model(networks["Chain"], data, policy(name))
    graph = exported(without_quantizers(result.model), data)
    assert bits_of_layers(prepare_pt2e(graph, pt2e.RepAPQQuantizer(policy(name)))) == result.layers


def test_a_layer_that_is_called_twice_and_one_that_is_transposed(
    networks: dict[str, nn.Module], data: list[Tensor]
) -> None:
    config = RepAPQConfig.from_preset("w4a4", keep_float=("lateral",), layer_bits={"tower.*": (6, 5)}, **QUICK)
    result = quantize_model(networks["Pyramid"], data, config)
    graph = exported(without_quantizers(result.model), data)
    assert bits_of_layers(prepare_pt2e(graph, pt2e.RepAPQQuantizer(config))) == result.layers


@pytest.mark.parametrize(
    ("key", "wrong"),
    [("keep_float", ("stage.1",)), ("layer_bits", {"stage.1*": (6, 6)}), ("layer_bits", {"stages.1": (6, 6)})],
)
def test_a_pattern_that_matches_nothing_is_an_error(
    key: str, wrong: object, networks: dict[str, nn.Module], data: list[Tensor]
) -> None:
    merged = without_quantizers(quantize_model(networks["Chain"], data, RepAPQConfig(**QUICK)).model)
    quantizer = pt2e.RepAPQQuantizer(RepAPQConfig.from_preset("w4a4", **{key: wrong}))
    with pytest.raises(ConfigError, match=rf"{key}: the pattern 'stages?\.1\*?' matches no"):
        prepare_pt2e(exported(merged, data), quantizer)
