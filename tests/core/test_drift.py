"""Buffers that each run changes are found, kept, and told from what settles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from repapq_plugin.core.drift import Drift, find_drift, kept_buffers, reset_buffers


class Counting(nn.Module):
    """Counts in place and anew, keeps a table that it makes once, and adds what it is told."""

    def __init__(self, added: str = "") -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("sum", torch.full((2,), torch.nan))
        self.register_buffer("table", torch.zeros(0))
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.sum = self.sum.nan_to_num() + x.mean()
        if self.table.shape != x.shape:
            self.table = torch.ones_like(x)
        more = {"": 0.0, "buffer": self.calls, "chance": torch.rand(())}[self.added]
        return x * self.table + more


def drift_of(added: str) -> tuple[Drift, nn.Module]:
    model = nn.Sequential(Counting(added)).train()
    return find_drift(model, lambda network: network(torch.ones(3))), model


@pytest.mark.parametrize(
    ("added", "outputs", "note"),
    [("", False, "changes its buffers (0.calls, 0.sum)"), ("buffer", True, "changes"), ("chance", True, "changes")],
)
def test_what_goes_on_changing_is_found_with_the_values_before(added: str, outputs: bool, note: str) -> None:
    drift, model = drift_of(added)
    assert list(drift.buffers) == ["0.calls", "0.sum"] and drift.outputs == outputs
    assert int(drift.buffers["0.calls"]) == 0 and bool(drift.buffers["0.sum"].isnan().all())
    assert len(drift.notes) == 1 and note in drift.notes[0]
    assert model.training and int(model[0].calls) == 2


def test_networks_of_chance_have_a_note_and_others_none() -> None:
    x = torch.ones(64)
    chance = find_drift(nn.Sequential(), lambda model: x * torch.rand(()))
    assert not chance.buffers and "other outputs for the same batch" in chance.notes[0]
    assert find_drift(nn.Dropout(0.5).train(), lambda model: model(x)) == Drift()
    assert find_drift(nn.Identity(), lambda model: model(x * torch.nan)).notes == ()


def test_runs_inside_change_copies() -> None:
    drift, model = drift_of("buffer")
    counting = model[0]
    own = counting.calls
    for _ in range(3):
        with kept_buffers(model, drift.buffers):
            assert float(model(torch.ones(3))[0]) == 4
            assert int(counting.calls) == 3 and counting.calls is not own
        assert counting.calls is own and int(own) == 2
    with pytest.raises(ZeroDivisionError), kept_buffers(model, {**drift.buffers, "not.there": own}):
        counting.calls += 1
        raise ZeroDivisionError
    assert counting.calls is own and int(own) == 2


def test_buffers_come_back_as_they_were() -> None:
    drift, model = drift_of("")
    reset_buffers(model, {**drift.buffers, "1.calls": torch.ones(())})
    assert int(model[0].calls) == 0 and bool(model[0].sum.isnan().all()) and model[0].table.numel() == 3
    model[0].calls += 1
    assert int(drift.buffers["0.calls"]) == 0
