"""Affine layers come and go without a trace, and all that learns can be brought back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from repapq_plugin.config import LearningRates
from repapq_plugin.core.compare import relative_error
from repapq_plugin.core.hooks import Hooks, unseen
from repapq_plugin.method.learners import Learner, restore, snapshot
from repapq_plugin.method.replay import inputs_of
from repapq_plugin.quantizers.layers import ChannelAffine
from tests.contracts.base import ROUNDING, ContractBase, codes_of, resting
from tests.support.comparing import equal, equal_numbers, numbers, outputs_of

RATES = LearningRates()


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


class LearningLaws(ContractBase):
    """What happens while a network with quantizers learns."""

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
