"""The algorithm as a step of NNCF's pipelines, and MAE ranges for its estimators."""

from __future__ import annotations

import copy

import nncf
import pytest
import torch
from nncf.quantization.algorithms.min_max.algorithm import MinMaxQuantization
from nncf.quantization.algorithms.pipeline import Pipeline
from nncf.quantization.algorithms.post_training.pipeline import create_ptq_pipeline
from nncf.tensor import Tensor as NNCFTensor
from nncf.torch.function_hook import get_hook_storage, wrap_model
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import GraphModelWrapper
from nncf.torch.quantization.layers import SymmetricQuantizer
from torch import Tensor, nn

from integration.nncf.conftest import Case
from repapq_plugin import MAEObserver, RepAPQConfig
from repapq_plugin.errors import CalibrationError, HostError
from repapq_plugin.hosts.nncf import RepAPQAlgorithm, mae_range_estimator
from repapq_plugin.hosts.nncf.range_estimator import MAERange, WholeTensor, collectors, register
from repapq_plugin.job import merge_for_inference


@pytest.fixture(scope="module")
def merged(chain: nn.Module) -> nn.Module:
    with torch.no_grad():
        network, *_ = merge_for_inference(chain, lambda model: model(torch.zeros(1, 3, 16, 16)))
    return network


def wrapper(model: nn.Module) -> GraphModelWrapper:
    return GraphModelWrapper(wrap_model(copy.deepcopy(model).eval()), torch.zeros(1, 3, 16, 16))


def error(model: nn.Module, merged: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        wanted = merged(x)
        return float((model(x) - wanted).abs().mean() / wanted.abs().mean())


def test_it_ends_nncfs_own_pipeline(merged: nn.Module, eight: Case) -> None:
    plain = create_ptq_pipeline(subset_size=8).run(wrapper(merged), eight.dataset).model
    algorithm = RepAPQAlgorithm(merged, eight.dataset, RepAPQConfig(steps=15))
    pipeline = create_ptq_pipeline(subset_size=8)
    pipeline.pipeline_steps.append([algorithm])
    done = pipeline.run(wrapper(merged), eight.dataset)
    assert isinstance(done, GraphModelWrapper)
    done.get_graph()
    assert error(done.model, merged, eight.unseen) < 0.8 * error(plain, merged, eight.unseen)
    assert len(algorithm.units) == 6 and any(unit.kept for unit in algorithm.units)


def test_it_follows_quantizers_placed_by_hand(merged: nn.Module, four: Case) -> None:
    starting = Pipeline([[MinMaxQuantization(subset_size=8)]]).run(wrapper(merged), four.dataset).model
    algorithm = RepAPQAlgorithm(merged, four.dataset, RepAPQConfig(weight_bits=6, activation_bits=6, steps=5))
    model = Pipeline([[MinMaxQuantization(subset_size=8)], [algorithm]]).run(wrapper(merged), four.dataset).model
    assert error(starting, merged, four.unseen) < 0.2 and error(model, merged, four.unseen) < 0.2
    assert not model.training and not starting.training


def test_a_teacher_of_another_network_is_refused(merged: nn.Module, chain: nn.Module, eight: Case) -> None:
    pipeline = Pipeline([[MinMaxQuantization(subset_size=2)], [RepAPQAlgorithm(chain, eight.dataset)]])
    with pytest.raises(HostError, match="The teacher has no module"):
        pipeline.run(wrapper(merged), eight.dataset)


def test_an_algorithm_without_data_is_refused(merged: nn.Module) -> None:
    with pytest.raises(CalibrationError, match="holds no item"):
        RepAPQAlgorithm(merged, nncf.Dataset([]))


def test_only_pytorch_is_served(merged: nn.Module, eight: Case) -> None:
    algorithm = RepAPQAlgorithm(merged, eight.dataset)
    assert [backend.name for backend in algorithm.available_backends] == ["TORCH"]


def test_nncf_takes_mae_ranges(merged: nn.Module, eight: Case) -> None:
    advanced = nncf.AdvancedQuantizationParameters(
        activations_range_estimator_params=mae_range_estimator(), disable_bias_correction=True
    )
    images = [x.clone() for x in eight.images]
    model = nncf.quantize(merged, nncf.Dataset(images), subset_size=len(images), advanced_parameters=advanced)
    hooks = dict(get_hook_storage(model).named_hooks())
    wanted = MAEObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    for x in images:
        wanted(x)
    of_input = hooks["post_hooks.x__0.0"]
    assert isinstance(of_input, SymmetricQuantizer) and of_input.signed
    torch.testing.assert_close(of_input.scale.detach(), wanted.find_range()[1].reshape(1), rtol=1e-4, atol=1e-5)
    unsigned, seen = MAEObserver(), []
    with torch.no_grad():
        handle = merged.stem.register_forward_hook(lambda module, args, output: seen.append(output))
        for x in images:
            merged(x)
        handle.remove()
    for x in seen:
        unsigned(x)
    behind_stem = hooks["post_hooks.stem/after/0/relu/0__0.0"]
    assert not behind_stem.signed
    torch.testing.assert_close(behind_stem.scale.detach(), unsigned.find_range()[1].reshape(1), rtol=1e-4, atol=1e-5)


def test_asymmetric_presets_get_both_ends(merged: nn.Module, eight: Case) -> None:
    advanced = nncf.AdvancedQuantizationParameters(activations_range_estimator_params=mae_range_estimator(False))
    images = [x + 0.5 for x in eight.images]
    model = nncf.quantize(
        merged,
        nncf.Dataset(images),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(images),
        advanced_parameters=advanced,
    )
    wanted = MAEObserver()
    for x in images:
        wanted(x)
    low, high = dict(get_hook_storage(model).named_hooks())["post_hooks.x__0.0"].get_input_low_input_high()
    step = float(high - low) / 255
    assert abs(float(low) - float(wanted.find_range()[0])) < 2 * step
    assert abs(float(high) - float(wanted.find_range()[1])) < 2 * step


def test_weights_are_refused_by_name(merged: nn.Module, eight: Case) -> None:
    advanced = nncf.AdvancedQuantizationParameters(weights_range_estimator_params=mae_range_estimator())
    with pytest.raises(HostError, match="per channel.*activations only"):
        nncf.quantize(merged, eight.dataset, subset_size=2, advanced_parameters=advanced)


def test_names_are_registered_once_and_reset_forgets() -> None:
    before = dict(collectors.AGGREGATORS_MAP)
    register()
    assert collectors.AGGREGATORS_MAP == before
    aggregator = collectors.AGGREGATORS_MAP[MAERange.MAX](num_samples=None, aggregation_axes=(0,))
    aggregator.register_reduced_input(NNCFTensor(torch.linspace(0, 8, 100)))
    large = float(aggregator.aggregate().data)
    aggregator.reset()
    assert aggregator.aggregate() is None
    aggregator.register_reduced_input(NNCFTensor(torch.linspace(0, 1, 100)))
    assert large > 4 > float(aggregator.aggregate().data)
    assert WholeTensor.RAW in collectors.REDUCERS_MAP
