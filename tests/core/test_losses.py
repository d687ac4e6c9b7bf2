"""The two reconstruction losses and what makes them relative."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repapq_plugin.config import LossName
from repapq_plugin.core.losses import LOSSES, mae_loss, mse_loss, relative_loss, sample_magnitudes

names = st.sampled_from(sorted(LOSSES))
seeds = st.integers(0, 2**32 - 1)


def pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, 5, generator=generator), torch.randn(3, 4, 5, generator=generator)


def test_configurations_can_name_every_loss_and_no_other() -> None:
    assert set(LOSSES) == set(LossName.__args__)  # type: ignore[attr-defined]


def test_by_hand() -> None:
    output, target = torch.tensor([1.0, 2.0, -3.0, 0.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert mae_loss(output, target).item() == 6 / 4
    assert mse_loss(output, target).item() == 20 / 4
    assert sample_magnitudes(target, "mae").item() == 2 / 4
    assert sample_magnitudes(output, "mse").item() == pytest.approx(14 / 4)
    assert relative_loss(output, target, "mae").item() == 3


@given(seeds, names)
def test_zero_for_equals_and_symmetric(seed: int, name: str) -> None:
    a, b = pair(seed)
    assert LOSSES[name](a, a).item() == 0
    assert LOSSES[name](a, b).item() == LOSSES[name](b, a).item() > 0


@given(seeds, names, st.floats(1e-3, 1e3))
def test_a_relative_loss_does_not_see_magnitude(seed: int, name: str, factor: float) -> None:
    a, b = pair(seed)
    relative = relative_loss(a, b, name)
    scaled = relative_loss(a * factor, b * factor, name)
    assert scaled.item() == pytest.approx(relative.item(), rel=1e-4)


def test_an_outlier_weighs_linearly_in_mae_and_quadratically_in_mse() -> None:
    target = torch.zeros(100)
    near, far = torch.zeros(100), torch.zeros(100)
    near[0], far[0] = 1.0, 10.0
    assert (mae_loss(far, target) / mae_loss(near, target)).item() == pytest.approx(10)
    assert (mse_loss(far, target) / mse_loss(near, target)).item() == pytest.approx(100)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_dead_output_can_be_divided_by(name: str) -> None:
    assert sample_magnitudes(torch.zeros(4), name).item() > 0
    assert relative_loss(torch.zeros(2, 4), torch.zeros(2, 4), name).item() == 0


@given(seeds, names)
def test_one_sample_alone_is_relative_to_its_size(seed: int, name: str) -> None:
    a, b = pair(seed)
    wanted = LOSSES[name](a, b) / LOSSES[name](torch.zeros_like(b), b)
    assert relative_loss(a[None], b[None], name).item() == pytest.approx(wanted.item(), rel=1e-5)


@given(seeds, names, st.floats(10, 1e4))
def test_a_loud_sample_counts_as_much_as_another(seed: int, name: str, factor: float) -> None:
    a, b = pair(seed)
    loud = torch.tensor([factor, 1.0, 1.0]).reshape(-1, 1, 1)
    error = torch.zeros_like(b)
    for sample in range(3):
        error[sample] = b[sample]  # an output of zero for one sample alone
        assert relative_loss((b - error) * loud, b * loud, name).item() <= 1 / 3 * (1 + 1e-5)
        error.zero_()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_quiet_sample_does_not_grow_loud(name: str) -> None:
    target = torch.ones(3, 8)
    target[0] = 1e-6
    output = target.clone()
    output[0] += 0.01
    loud = target.clone()
    loud[1] += 0.01
    assert relative_loss(output, target, name).item() == pytest.approx(
        relative_loss(loud, target, name).item(), rel=0.01
    )
