"""A whole job on a backend: better than ranges alone, the same again, and nothing changed outside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from repapq_plugin.core.checkpoints import CheckpointFolder
from repapq_plugin.job import Job, Progress
from tests.contracts.base import ContractBase
from tests.support.comparing import equal, equal_numbers, flags, hooks_of, numbers, outputs_of


def mean_error(model: nn.Module, wanted: nn.Module, x: Tensor) -> float:
    pairs = zip(outputs_of(model, x), outputs_of(wanted, x), strict=True)
    return sum(float((a - b).abs().mean()) for a, b in pairs)


class JobLaws(ContractBase):
    """What a whole job owes its user."""

    def test_a_few_steps_come_nearer_to_the_float_network_than_ranges_alone(
        self, model: nn.Module, data: list[Tensor], unseen: Tensor
    ) -> None:
        ranges = self.delivered(model, data, steps=0)
        learned = self.delivered(model, data, steps=self.learning_steps)
        assert mean_error(learned, model, unseen) < mean_error(ranges, model, unseen)

    def test_solved_weights_come_nearer_to_the_float_network_than_ranges_alone(
        self, model: nn.Module, data: list[Tensor]
    ) -> None:
        # On what they were solved for: a handful of noise says little about unseen noise.
        ranges = self.delivered(model, data, steps=0)
        solved = self.delivered(model, data, steps=0, solve=True)
        assert mean_error(solved, model, data[0]) < mean_error(ranges, model, data[0])

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

    def test_what_was_interrupted_goes_on_to_the_same_bits(
        self, model: nn.Module, data: list[Tensor], unseen: Tensor, tmp_path: Path
    ) -> None:
        wanted = self.delivered(model, data)

        def stop(progress: Progress) -> None:
            if progress.phase == "calibration" and progress.done == 6:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Job(self.backend(), self.config(), report=stop, checkpoints=CheckpointFolder(tmp_path)).run(model, data)
        kept = CheckpointFolder(tmp_path, resume=True)
        found = self.record(Job(self.backend(), self.config(), checkpoints=kept).run(model, data)).model
        assert kept.finished[0] == "ranges" and len(kept.finished) > 2
        assert equal(outputs_of(found, unseen), outputs_of(wanted, unseen))
        assert equal_numbers(numbers(found), numbers(wanted))

    def test_what_is_delivered_requires_gradients_as_its_host_s_users_expect(
        self, model: nn.Module, data: list[Tensor]
    ) -> None:
        last = list(model.parameters())[-1]
        last.requires_grad_(False)
        delivered = self.delivered(model, data)
        assert flags(delivered) == self.delivered_flags(model, delivered)
        assert all(parameter.grad is None for parameter in delivered.parameters())
        assert not delivered.training
