"""Sites of the plugin's own backend: what is quantized, and each quantizer once."""

from __future__ import annotations

import pytest
import torch

from repapq_plugin.config import RepAPQConfig
from repapq_plugin.quantizers.layers import QuantizedLayer, weight_of
from tests.support.networks import Chain, Pyramid, batches, settle
from tests.support.placed import after


def test_weights_come_first_and_a_shared_activation_stands_once() -> None:
    job, state = after("place", settle(Pyramid()), batches(1), RepAPQConfig())
    sites = job.backend.sites
    assert list(sites.weights) == list(state.plans)
    assert sites.quantizers == [
        *(site.quantizer for site in sites.weights.values()),
        *(site.quantizer for site in sites.activations),
    ]
    assert len({quantizer.module for quantizer in sites.quantizers}) == len(sites.quantizers)
    own = [name for name in sites.weights if name not in ("boxes", "lateral.0")]  # others read the same tensor first
    assert [site.where for site in sites.activations] == [f"The input of {name!r}" for name in own]


def test_a_site_names_the_layer_and_what_the_network_calls() -> None:
    job, state = after("place", settle(Chain()), batches(1), RepAPQConfig())
    for name, site in job.backend.sites.weights.items():
        called = job.backend.student.get_submodule(name)
        assert site.name == name and site.layer is called
        assert isinstance(called, QuantizedLayer) and site.quantizer.module is called.weight_fake_quant
        assert weight_of(site.layer).shape == state.teacher.get_submodule(name).weight.shape


@pytest.mark.parametrize("name", ["min_max", "mse"])
def test_an_observer_has_the_grid_of_its_quantizer(name: str) -> None:
    job, _ = after("place", settle(Chain()), batches(1), RepAPQConfig.from_preset("w3a5"))
    for quantizer in job.backend.sites.quantizers:
        observer = quantizer.observer(name)
        assert (observer.quant_min, observer.quant_max) == quantizer.bounds
        assert observer.per_channel == (quantizer.ch_axis is not None)
        assert quantizer.ch_axis in (None, observer.ch_axis)
    percentile = job.backend.sites.activations[1].quantizer.observer("percentile", percentile=60.0)
    percentile(torch.linspace(0, 1, 1000))
    assert percentile.calculate_qparams()[0].item() * 31 == pytest.approx(0.6, abs=0.01)
