"""A QConfigMapping gives each layer the bits that `quantize_model` gives it, and says which patterns match nothing."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import QConfigMapping
from torch.ao.quantization.quantize_fx import prepare_fx, prepare_qat_fx
from torch.fx import GraphModule

from integration.torch_ao.shared import POLICIES, QUICK, policy
from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.errors import ConfigError
from repapq_plugin.export.deploy import without_quantizers
from repapq_plugin.hosts import torch_ao
from repapq_plugin.hosts.torch_ao._compat import layer_of, qconfig_of
from repapq_plugin.hosts.torch_ao.grid import weight_quantizer_of
from repapq_plugin.observers import RangeObserver
from repapq_plugin.quantizers.layers import QUANTIZABLE
from tests.support.networks import Chain, batches, settle


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    torch.manual_seed(1)
    return batches(2)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return settle(Chain())


def layers_of(network: nn.Module) -> list[str]:
    return [path for path, module in network.named_modules() if isinstance(module, QUANTIZABLE)]


def bits_of_layers(prepared: GraphModule) -> dict[str, tuple[int, int]]:
    """Bits of the weight and the output of each layer that torch.ao prepared, by its name."""
    found = {}
    for node in prepared.graph.nodes:
        module = prepared.get_submodule(node.target) if node.op == "call_module" else None
        if module is None or not isinstance(layer_of(module), QUANTIZABLE):
            continue
        qconfig, weight = qconfig_of(module), weight_quantizer_of(module)
        if qconfig is not None and weight is not None:
            found[str(node.target)] = (weight.num_bits, qconfig.activation().quant_max.bit_length())
    return found


@pytest.mark.parametrize("way", ["patterns", "names", "training"])
@pytest.mark.parametrize("name", POLICIES)
def test_each_layer_has_the_bits_that_quantize_model_gives_it(
    name: str, way: str, network: nn.Module, data: list[Tensor]
) -> None:
    result = quantize_model(network, data, policy(name))
    merged = without_quantizers(result.model)
    first, *_, last = layers_of(merged)
    mapping = torch_ao.repapq_qconfig_mapping(
        policy(name), is_qat=way == "training", first_last=(first, last), model=None if way == "patterns" else merged
    )
    prepared = prepared_by(mapping, merged, data, is_qat=way == "training")
    assert bits_of_layers(prepared) == result.layers


def prepared_by(mapping: QConfigMapping, network: nn.Module, data: list[Tensor], is_qat: bool) -> GraphModule:
    prepare = prepare_qat_fx if is_qat else prepare_fx
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prepare(copy.deepcopy(network).train(is_qat), mapping, (data[0],))


def test_what_stays_float_is_trained_in_float(data: list[Tensor]) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
    config = RepAPQConfig.from_preset("w4a4", keep_float=("3",), layer_bits={"0": (3, 5)}, **QUICK)
    prepared = prepared_by(torch_ao.repapq_qconfig_mapping(config, is_qat=True, model=network), network, data, True)
    assert bits_of_layers(prepared) == {"0": (3, 5), "4": (4, 4)}
    assert type(prepared.get_submodule("3")) is nn.Conv2d
    for key in ("keep_float", "layer_bits"):
        alone = RepAPQConfig.from_preset("w4a4", **{key: getattr(config, key)})
        with pytest.raises(ConfigError, match="Give the network as model"):
            torch_ao.repapq_qconfig_mapping(alone, is_qat=True)


@pytest.mark.parametrize("key", ["keep_float", "layer_bits"])
def test_with_the_network_a_pattern_that_matches_nothing_is_an_error(key: str, network: nn.Module) -> None:
    wrong = ("stage.1",) if key == "keep_float" else {"stage.1*": (6, 6)}
    config = RepAPQConfig.from_preset("w4a4", **{key: wrong})
    with pytest.raises(ConfigError, match=rf"{key}: the pattern 'stage\.1\*?' matches no"):
        torch_ao.repapq_qconfig_mapping(config, model=network)
    torch_ao.repapq_qconfig_mapping(config)  # a mapping alone cannot know


def test_layer_bits_name_layers(network: nn.Module) -> None:
    config = RepAPQConfig.from_preset("w4a4", layer_bits={"pool": (6, 6)})
    with pytest.raises(ConfigError, match="layer_bits: the pattern 'pool'"):
        torch_ao.repapq_qconfig_mapping(config, model=network)


class Mixed(nn.Module):
    """A layer, and what stays float whatever pattern matches it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AvgPool2d(2), nn.ConvTranspose2d(8, 8, 2, 2))
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(x)).mean((2, 3))


def test_with_the_network_only_layers_with_a_kernel_take_special_bits(data: list[Tensor]) -> None:
    config = RepAPQConfig.from_preset("w4a4", layer_bits={"*": (6, 5)}, **QUICK)
    network = Mixed().eval()
    prepared = prepare_fx(copy.deepcopy(network), torch_ao.repapq_qconfig_mapping(config, model=network), (data[0],))
    assert bits_of_layers(prepared) == {"block.0": (6, 5), "last": (6, 5)}
    assert all(qconfig_of(prepared.get_submodule(name)) is None for name in ("block.1", "block.2"))
    with torch.no_grad():
        prepared(data[0])
        converted = torch_ao.convert_to_int8(prepared, "x86")
        with torch_ao.integer_engine("x86"):
            assert converted(data[0]).shape == (len(data[0]), 4)
    called = [module for module in converted.modules() if isinstance(module, nn.AvgPool2d | nn.ConvTranspose2d)]
    assert len(called) == 2
    assert [node.target for node in converted.graph.nodes][-2] == "mean"


def test_without_the_network_a_pattern_reaches_no_function_that_the_network_calls(data: list[Tensor]) -> None:
    config = RepAPQConfig.from_preset("w4a4", layer_bits={"*": (6, 5)}, **QUICK)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), Mean())
    prepared = prepared_by(torch_ao.repapq_qconfig_mapping(config), network.eval(), data, False)
    assert bits_of_layers(prepared) == {"0": (6, 5)}
    whole = prepared_by(torch_ao.repapq_qconfig_mapping(config), Mean(), data, False)
    assert not [module for module in whole.modules() if isinstance(module, RangeObserver)]


class Mean(nn.Module):
    """Averages that a network computes itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))
