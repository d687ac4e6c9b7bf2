"""`BackendContract`: what every backend owes the one job. A host's test subclasses it under a name with ``Test``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from repapq_plugin.backend import Backend
from repapq_plugin.config import LearningRates, RepAPQConfig
from repapq_plugin.core.compare import relative_error
from repapq_plugin.core.hooks import Hooks, unseen
from repapq_plugin.core.tensors import floating_tensors
from repapq_plugin.job import Job, State
from repapq_plugin.method.learners import Learner, restore, snapshot
from repapq_plugin.method.replay import inputs_of
from repapq_plugin.method.sites import Quantizer
from repapq_plugin.method.starting_ranges import not_quantizing
from repapq_plugin.policy import bits_of
from repapq_plugin.quantizers.layers import ChannelAffine
from repapq_plugin.result import Calibrated
from tests.support.networks import Chain, Pyramid, batches, settle
from tests.support.placed import on_backend_after

RATES = LearningRates()

ROUNDING = 2e-5
"""What two orders of the same float32 sums may differ by, relative to the largest output."""

Numbers = dict[str, Tensor]


def outputs_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return floating_tensors(model(x.clone()))


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def numbers(model: nn.Module) -> Numbers:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def equal_numbers(one: Numbers, other: Numbers) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def hooks_of(model: nn.Module) -> list[object]:
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


def mean_error(model: nn.Module, wanted: nn.Module, x: Tensor) -> float:
    pairs = zip(outputs_of(model, x), outputs_of(wanted, x), strict=True)
    return sum(float((a - b).abs().mean()) for a, b in pairs)


def returned_by(module: nn.Module, run: Callable[[], object]) -> list[Tensor]:
    """What a module returns, call after call, before the network goes on and may change it in place."""
    found: list[Tensor] = []

    def after(_: nn.Module, args: object, output: Tensor) -> None:
        with unseen():
            found.append(output.clone())

    with Hooks() as hooks:
        hooks.after(module, after)
        run()
    return found


def codes_of(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Integers that a quantizer makes of a tensor, told from what it returns."""
    scale, zero_point = quantizer.qparams()
    shape = [1] * x.dim()
    if quantizer.ch_axis is not None:
        shape[quantizer.ch_axis] = -1
    with torch.no_grad():
        return (quantizer.module(x) / scale.reshape(shape)).round() + zero_point.reshape(shape)


@contextmanager
def resting(quantizers: Sequence[Quantizer]) -> Iterator[None]:
    with torch.no_grad(), not_quantizing(quantizers):
        yield


class BackendContract(ABC):
    """Laws of a `Backend`; each holds for a chain of blocks and for a pyramid whose head is called twice."""

    preset = "w4a4"
    learning_steps = 40

    @abstractmethod
    def backend(self) -> Backend[object]:
        """Return a new backend."""

    @abstractmethod
    def record(self, result: object) -> Calibrated:
        """Return the simulated network and the record of what the backend delivers."""

    def delivered(self, model: nn.Module, data: Sequence[Tensor], **keys: object) -> nn.Module:
        """Run a whole job and return the simulated network of what it delivers."""
        return self.record(Job(self.backend(), self.config(**keys)).run(model, data)).model

    def delivered_flags(self, model: nn.Module, delivered: nn.Module) -> dict[str, bool]:
        """Return which parameters of what is delivered should require gradients: none, unless a host says other."""
        return dict.fromkeys(flags(delivered), False)

    # -- how a test gets its networks -----------------------------------------------------------------------------

    @pytest.fixture(autouse=True)
    def _one_seed(self) -> None:
        torch.manual_seed(0)

    @pytest.fixture(params=[Chain, Pyramid], ids=["chain", "pyramid"])
    def model(self, request: pytest.FixtureRequest) -> nn.Module:
        """The user's float network."""
        torch.manual_seed(1)
        return settle(request.param())

    @pytest.fixture
    def data(self) -> list[Tensor]:
        """Calibration batches."""
        torch.manual_seed(2)
        return batches(4)

    @pytest.fixture
    def unseen(self) -> Tensor:
        """Images of which no calibration knows."""
        torch.manual_seed(3)
        return torch.randn(32, 3, 16, 16)

    def config(self, **keys: object) -> RepAPQConfig:
        return RepAPQConfig.from_preset(self.preset, **{"steps": 4, **keys})

    def after(
        self, phase: str, model: nn.Module, data: Sequence[Tensor], **keys: object
    ) -> tuple[Backend[object], State]:
        job, state = on_backend_after(self.backend(), phase, model, data, self.config(**keys))
        return job.backend, state

    # -- placing --------------------------------------------------------------------------------------------------

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

    # -- quantizers -----------------------------------------------------------------------------------------------

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

    # -- the affine layer -----------------------------------------------------------------------------------------

    def test_attaching_affine_layers_changes_nothing(
        self, model: nn.Module, data: list[Tensor], unseen: Tensor
    ) -> None:
        backend, _ = self.after("find_ranges", model, data)
        before = outputs_of(backend.student, unseen)
        backend.attach_affine()
        assert any(isinstance(module, ChannelAffine) for module in backend.student.modules())
        assert equal(outputs_of(backend.student, unseen), before)

    def test_folding_learned_affine_layers_keeps_codes_but_for_signs_and_what_is_computed(
        self, model: nn.Module, data: list[Tensor], unseen: Tensor
    ) -> None:
        # Eight bits: a host may carry fewer in another grid. Activations rest: a last bit may move one to another code.
        bits = {"weight_bits": 8, "activation_bits": 8}
        backend, state = self.after("find_ranges", model, data, **bits)
        backend.attach_affine()
        affines = [module for module in backend.student.modules() if isinstance(module, ChannelAffine)]
        with torch.no_grad():
            for affine in affines:
                affine.gamma.copy_((torch.rand_like(affine.gamma) + 0.5) * torch.randn_like(affine.gamma).sign())
                affine.beta.copy_(torch.randn_like(affine.beta) * 0.1)
        sites = backend.sites
        codes = {name: codes_of(site.quantizer, site.layer.weight) for name, site in sites.weights.items()}
        with resting([site.quantizer for site in sites.activations]):
            before = outputs_of(backend.student, unseen)
        backend.fold(state.teacher, {})
        assert not any(isinstance(module, ChannelAffine) for module in backend.student.modules())
        sites = backend.sites
        flipped = 0
        for name, site in sites.weights.items():
            found = codes_of(site.quantizer, site.layer.weight)
            assert torch.equal(found.abs(), codes[name].abs())
            flipped += int((found != codes[name]).sum())
        assert flipped
        with resting([site.quantizer for site in sites.activations]):
            assert relative_error(outputs_of(backend.student, unseen), before) <= ROUNDING

    def test_folding_without_affine_layers_keeps_what_is_computed(
        self, model: nn.Module, data: list[Tensor], unseen: Tensor
    ) -> None:
        backend, state = self.after("find_ranges", model, data)
        before = outputs_of(backend.student, unseen)
        backend.fold(state.teacher, {})
        after = outputs_of(backend.student, unseen)
        peaks = [float(tensor.abs().max()) for tensor in before]
        moved = torch.zeros(len(unseen), dtype=torch.bool)
        for one, other, peak in zip(after, before, peaks, strict=True):
            moved |= ((one - other).abs() > ROUNDING * peak).flatten(1).any(1)
        # A last bit may move an activation to the other of two codes, in an image here or there.
        assert moved.float().mean() <= 1 / 8

    # -- learning -------------------------------------------------------------------------------------------------

    def test_a_module_run_alone_gives_what_it_gives_in_the_network(self, model: nn.Module, data: list[Tensor]) -> None:
        backend, state = self.after("find_ranges", model, data)
        backend.attach_affine()
        names = {name for stage in state.stages for name in (stage.name, *(unit.name for unit in stage.units))}
        x = state.batches[0]
        modules = dict(backend.student.named_modules())
        with torch.no_grad(), backend.learning(sorted(names)):
            for name in sorted(names):
                inputs = inputs_of(modules[name], state.trace.modules[name].calls, lambda: backend.student(x))
                wanted = returned_by(modules[name], lambda: backend.student(x))
                assert equal(backend.run_alone(name, inputs), wanted), name

    def test_gradients_pass_through_a_module_run_alone(self, model: nn.Module, data: list[Tensor]) -> None:
        backend, state = self.after("find_ranges", model, data)
        names = [stage.name for stage in state.stages]
        modules = dict(backend.student.named_modules())
        with backend.learning(names):
            for name in names:
                with torch.no_grad():
                    run = lambda: backend.student(state.batches[0])  # noqa: E731
                    inputs = inputs_of(modules[name], state.trace.modules[name].calls, run)
                inputs = [tensor.requires_grad_(True) for tensor in inputs]
                given = [tensor * 1 for tensor in inputs]  # a module may work in place
                outputs = backend.run_alone(name, given)
                gradients = torch.autograd.grad(sum(output.square().sum() for output in outputs), inputs)
                assert all(bool(gradient.any()) for gradient in gradients)

    def test_learners_hold_all_that_learning_changes(
        self, model: nn.Module, data: list[Tensor], unseen: Tensor
    ) -> None:
        backend, state = self.after("find_ranges", model, data)
        backend.attach_affine()
        names = [stage.name for stage in state.stages]
        with backend.learning(names):
            learners: dict[str, Learner] = backend.learners()
            assert set(backend.sites.weights) <= set(learners)
            before, outputs = numbers(backend.student), outputs_of(backend.student, unseen)
            saved = snapshot(learners)
            parameters = {
                id(each.parameter): each for learner in learners.values() for each in learner.learnables(1.0, RATES)
            }
            assert all(each.rate > 0 for each in parameters.values())
            with torch.no_grad():
                for each in parameters.values():
                    each.parameter.add_(0.05 * torch.randn_like(each.parameter))
            assert not equal(outputs_of(backend.student, unseen), outputs)
            restore(learners, saved)
            assert equal_numbers(numbers(backend.student), before)
            assert equal(outputs_of(backend.student, unseen), outputs)

    def test_the_form_in_which_it_learns_computes_the_same_and_ends(
        self, model: nn.Module, data: list[Tensor], unseen: Tensor
    ) -> None:
        backend, state = self.after("find_ranges", model, data)
        before, kept = outputs_of(backend.student, unseen), numbers(backend.student)
        with backend.learning([stage.name for stage in state.stages]):
            assert relative_error(outputs_of(backend.student, unseen), before) <= 0.05
        after = numbers(backend.student)
        assert after.keys() == kept.keys()
        assert all(torch.allclose(after[key], kept[key], rtol=1e-5) for key in kept)

    # -- the whole job --------------------------------------------------------------------------------------------

    def test_a_few_steps_come_nearer_to_the_float_network_than_ranges_alone(
        self, model: nn.Module, data: list[Tensor], unseen: Tensor
    ) -> None:
        ranges = self.delivered(model, data, steps=0)
        learned = self.delivered(model, data, steps=self.learning_steps)
        assert mean_error(learned, model, unseen) < mean_error(ranges, model, unseen)

    def test_the_user_s_model_and_the_float_network_stay_as_they_are(
        self, model: nn.Module, data: list[Tensor]
    ) -> None:
        model.train()
        frozen = next(model.parameters()).requires_grad_(False)
        before, required, given = numbers(model), flags(model), [batch.clone() for batch in data]
        Job(self.backend(), self.config()).run(model, data)
        assert equal_numbers(numbers(model), before)
        assert flags(model) == required and not frozen.requires_grad
        assert model.training and hooks_of(model) == []
        assert equal(data, given)
        backend, state = self.after("plan", model, data)
        job = Job(backend, self.config())
        phases = [phase for phase in backend.phases if phase not in state.done]
        if "condition" in phases:
            job.condition(state)
        teacher = numbers(state.teacher)
        for phase in phases:
            if phase != "condition":
                getattr(job, phase)(state)
        assert equal_numbers(numbers(state.teacher), teacher)
        assert hooks_of(state.teacher) == []
        assert not any(flags(state.teacher).values())

    def test_the_same_seed_gives_the_same_bits_and_leaves_torch_s_own_alone(
        self, model: nn.Module, data: list[Tensor], unseen: Tensor
    ) -> None:
        found = []
        for state in (5, 6):
            torch.manual_seed(state)
            drawn = torch.random.get_rng_state()
            found.append(self.delivered(model, data, seed=3))
            assert torch.equal(torch.random.get_rng_state(), drawn)
        assert equal(outputs_of(found[0], unseen), outputs_of(found[1], unseen))
        assert equal_numbers(numbers(found[0]), numbers(found[1]))

    def test_what_is_delivered_requires_gradients_as_its_host_s_users_expect(
        self, model: nn.Module, data: list[Tensor]
    ) -> None:
        last = list(model.parameters())[-1]
        last.requires_grad_(False)
        delivered = self.delivered(model, data)
        assert flags(delivered) == self.delivered_flags(model, delivered)
        assert all(parameter.grad is None for parameter in delivered.parameters())
        assert not delivered.training
