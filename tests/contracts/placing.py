"""A backend places what was planned, and its quantizers do what a `Quantizer` says."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repapq_plugin.job import Job
from repapq_plugin.policy import bits_of
from tests.contracts.base import ContractBase, codes_of, resting
from tests.support.comparing import equal, outputs_of
from tests.support.networks import Chain


class PlacingLaws(ContractBase):
    """Where the network is quantized, and by what."""

    def test_with_its_quantizers_off_it_is_the_float_network(
        self, model: nn.Module, data: list[Tensor], unseen: Tensor
    ) -> None:
        backend, state = self.after("find_ranges", model, data)
        with resting(backend.sites.quantizers):
            off = outputs_of(backend.student, unseen)
        wanted = outputs_of(state.teacher, unseen)
        assert equal(off, wanted)  # not one bit: no host fuses anything that the job had not merged
        assert not equal(outputs_of(backend.student, unseen), wanted)
        assert not backend.student.training

    def test_each_planned_layer_has_a_weight_or_is_left_float_by_name(
        self, model: nn.Module, data: list[Tensor]
    ) -> None:
        keys = {"keep_float": ("stages.1.0" if isinstance(model, Chain) else "lateral",)}
        backend, state = self.after("place", model, data, **keys)
        sites = backend.sites
        assert list(sites.weights) == list(backend.plans) and set(sites.weights) <= set(state.plans)
        assert state.float_layers and not set(state.float_layers) & set(sites.weights)
        for name, site in sites.weights.items():
            assert site.name == name
            assert site.layer.weight.shape == state.teacher.get_submodule(name).weight.shape
        record = self.record(Job(self.backend(), self.config(steps=0, **keys)).run(model, data))
        assert set(record.layers) == set(sites.weights)
        assert set(record.layers) | set(record.float_layers) == set(state.trace.layers)
        assert not set(record.layers) & set(record.float_layers) and all(record.float_layers.values())

    def test_bits_are_those_of_the_one_policy(self, model: nn.Module, data: list[Tensor]) -> None:
        pattern = "stages.1.*" if isinstance(model, Chain) else "tower*"
        backend, state = self.after("place", model, data, layer_bits={pattern: (3, 6)})
        config = self.config(layer_bits={pattern: (3, 6)})
        activations = []
        for name, site in backend.sites.weights.items():
            wanted = bits_of(name, state.trace.layers[name].at_an_end, config)
            low, high = site.quantizer.bounds
            assert (high - low).bit_length() == wanted[0]
            plan = backend.plans[name]
            assert plan.weight_bits == wanted[0]
            if plan.input_group is not None:
                assert plan.activation_bits >= wanted[1]
                activations.append(plan.activation_bits)
        grids = [high - low for low, high in (site.quantizer.bounds for site in backend.sites.activations)]
        assert {3, 6, 8} <= {*activations, 3}
        assert {grid.bit_length() for grid in grids} <= {*activations, 8}

    def test_quantizers_are_each_named_once(self, model: nn.Module, data: list[Tensor]) -> None:
        backend, _ = self.after("place", model, data)
        sites = backend.sites
        modules = [quantizer.module for quantizer in sites.quantizers]
        assert len(set(modules)) == len(modules) == len(sites.weights) + len(sites.activations)
        inside = set(backend.student.modules())
        assert all(module in inside for module in modules)
        assert len({site.where for site in sites.activations}) == len(sites.activations)

    def test_what_is_set_is_what_is_read(self, model: nn.Module, data: list[Tensor]) -> None:
        backend, _ = self.after("find_ranges", model, data)
        for quantizer in backend.sites.quantizers:
            scale, zero_point = quantizer.qparams()
            assert scale.shape == zero_point.shape and scale.dim() == 1
            assert zero_point.dtype is torch.int64 and scale.is_floating_point()
            assert not scale.requires_grad and bool((scale > 0).all())
            for factor in (1.0, 2.5, 1e-3):
                quantizer.set_qparams(scale * factor, zero_point)
                found = quantizer.qparams()
                torch.testing.assert_close(found[0], scale * factor, rtol=1e-5, atol=0)
                assert torch.equal(found[1], zero_point)

    def test_a_quantizer_rounds_to_its_grid_or_hands_on(self, model: nn.Module, data: list[Tensor]) -> None:
        backend, _ = self.after("find_ranges", model, data)
        sites = backend.sites
        sources = [(site.quantizer, site.layer.weight.detach() * 1.5) for site in sites.weights.values()]
        sources += [(site.quantizer, torch.randn(2, 8, 4, 4)) for site in sites.activations]
        for quantizer, x in sources:
            assert quantizer.quantizing
            with torch.no_grad():
                hat = quantizer.module(x)
                torch.testing.assert_close(quantizer.module(hat), hat, rtol=1e-5, atol=1e-6)
            codes = codes_of(quantizer, x)
            low, high = quantizer.bounds
            assert low <= codes.min() and codes.max() <= high
            scale = quantizer.qparams()[0]
            if scale.numel() == 1:
                reach = (torch.tensor([low, high]) - quantizer.qparams()[1]) * scale
                inside = (x >= reach[0]) & (x <= reach[1])
                assert bool(((hat - x).abs()[inside] <= 0.5001 * scale).all())
            quantizer.quantizing = False
            assert not quantizer.quantizing
            assert torch.equal(quantizer.module(x), x)
            quantizer.quantizing = True
            with torch.no_grad():
                assert torch.equal(quantizer.module(x), hat)

    def test_an_observer_watches_the_same_grid(self, model: nn.Module, data: list[Tensor]) -> None:
        backend, _ = self.after("place", model, data)
        for quantizer in backend.sites.quantizers:
            observer = quantizer.observer("min_max")
            assert (observer.quant_min, observer.quant_max) == quantizer.bounds
            assert observer.per_channel == (quantizer.ch_axis is not None)
