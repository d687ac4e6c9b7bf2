"""The export form computes what the calibrated model computes, from integers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from repapq_plugin.core.quant_primitives import quantize
from repapq_plugin.errors import ExportError
from repapq_plugin.export.deploy import DeployedLayer, deployable, without_quantizers
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize
from repapq_plugin.quantizers.layers import ChannelAffine, QuantizedLayer, quantize_layer
from tests.support.export_networks import (
    NETWORKS,
    Chain,
    Transposed,
    float_copy,
    make,
    outputs_of,
    quantized,
    set_ranges,
)

BITS = [(8, 8), (6, 6), (4, 4), (3, 5), (2, 2)]


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize(("w", "a"), BITS)
def test_deployed_model_equals_the_calibrated_one(kind: type[nn.Module], w: int, a: int) -> None:
    model, x = make(kind, w, a)
    deployed = deployable(model)
    x = 3 * x  # also beyond the ranges, where codes are clamped
    for got, expected in zip(outputs_of(deployed, x), outputs_of(model, x), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("w", "a"), BITS)
def test_codes_are_those_of_the_grid(w: int, a: int) -> None:
    model, _ = make(Transposed, w, a)
    deployed = deployable(model)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer):
            quantizer, axis = layer.weight_fake_quant, layer.weight_fake_quant.ch_axis
            codes = quantize(
                layer.weight,
                quantizer.scale,
                quantizer.zero_point,
                quantizer.quant_min,
                quantizer.quant_max,
                axis,
            )
            stored = deployed.get_submodule(name).weight_codes
            assert stored.dtype == torch.int8
            assert torch.equal(stored.int(), codes)
            assert stored.abs().max() == 2 ** (w - 1) - 1


def test_the_model_is_left_alone_and_the_copy_holds_no_float_weight() -> None:
    model, x = make(Chain, 8, 8)
    before = outputs_of(model, x)[0]
    deployed = deployable(model)
    layers = [m for m in deployed.modules() if isinstance(m, DeployedLayer)]
    assert len(layers) == Chain.layers
    for layer in layers:
        assert "weight" not in dict(layer.named_parameters()) | dict(layer.named_buffers()) | vars(layer)
        assert torch.equal(layer.weight, layer.dequantized_weight())  # for who reads it all the same
    assert not any(isinstance(m, QuantizedLayer | LearnableFakeQuantize) for m in deployed.modules())
    assert torch.equal(outputs_of(model, x)[0], before)
    assert model.first.weight is not None


def test_layers_that_do_not_quantize_come_back_plain() -> None:
    model, x = make(Chain, 4, 4)
    for quantizer in (model.second.input_fake_quant, model.second.weight_fake_quant):
        quantizer.enable_fake_quant(False)
    model.third.input_fake_quant.enable_fake_quant(False)
    deployed = deployable(model)
    assert type(deployed.second) is nn.Conv2d
    assert deployed.third.quantizes_weight
    assert not deployed.third.quantizes_input
    assert torch.equal(outputs_of(deployed, x)[0], outputs_of(model, x)[0])


def test_one_layer_under_two_names_stays_one() -> None:
    torch.manual_seed(0)
    layer = quantized(nn.Conv2d(4, 4, 3, padding=1), 4, 4)
    x = torch.randn(1, 4, 6, 6)
    model = set_ranges(nn.Sequential(layer, nn.ReLU(), layer), x)
    deployed = deployable(model)
    assert deployed[0] is deployed[2]
    assert torch.equal(deployed(x), model(x))


def test_a_quantized_layer_alone_can_be_deployed() -> None:
    layer, x = quantized(nn.Linear(5, 3), 8, 6), torch.randn(4, 5)
    set_ranges(layer, x)
    assert torch.equal(deployable(layer)(x), layer(x))
    assert isinstance(without_quantizers(layer), nn.Linear)


def test_without_quantizers_is_the_float_model() -> None:
    model, x = make(Chain, 2, 2)
    plain = without_quantizers(model)
    assert not any(isinstance(module, QuantizedLayer) for module in plain.modules())
    first, second, third = (float_copy(layer) for layer in (model.first, model.second, model.third))
    expected = third(second(first(x).relu()).relu())
    assert torch.equal(plain(x), expected)


def test_per_tensor_weights() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    weight = LearnableFakeQuantize(quant_min=-7, quant_max=7, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    layer = quantize_layer(nn.Conv2d(3, 4, 3), weight, LearnableFakeQuantize(quant_min=0, quant_max=15))
    set_ranges(layer, x)
    assert torch.equal(deployable(layer)(x), layer(x))


def test_an_unfolded_affine_is_refused_by_name() -> None:
    model, _ = make(Chain, 8, 8)
    model.second.affine = ChannelAffine(8, 2, model.second.weight)
    with pytest.raises(ExportError, match=r"second: its affine is not folded"):
        deployable(model)


def test_an_observing_quantizer_is_refused_by_name() -> None:
    model, _ = make(Chain, 8, 8)
    model.third.input_fake_quant.enable_observer()
    with pytest.raises(ExportError, match=r"third\.input_fake_quant still observes"):
        deployable(model)


def test_a_layer_that_never_ran_is_refused_by_name() -> None:
    model = nn.Sequential(quantized(nn.Conv2d(3, 4, 1), 8, 8)).eval()
    for quantizer in (model[0].input_fake_quant, model[0].weight_fake_quant):
        quantizer.enable_observer(False)
    with pytest.raises(ExportError, match=r"0: its weight quantizer has 1 scales for 4"):
        deployable(model)


def test_grids_that_do_not_fit_are_refused_by_name() -> None:
    model, _ = make(Chain, 8, 8)
    model.first.input_fake_quant.quant_max = 511
    with pytest.raises(ExportError, match=r"first: input grid \[0, 511\]"):
        deployable(model)
    model, _ = make(Chain, 8, 8)
    model.first.weight_fake_quant.quant_min = -512
    with pytest.raises(ExportError, match=r"first: the weight grid \[-512, 127\]"):
        deployable(model)
    model, _ = make(Transposed, 8, 8)
    model.up.weight_fake_quant.ch_axis = 0
    with pytest.raises(ExportError, match=r"up: weights are quantized along axis 0"):
        deployable(model)
