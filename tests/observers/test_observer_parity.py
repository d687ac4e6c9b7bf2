"""Min-max ranges are those of torch.ao's observers, whatever the scheme."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.ao.quantization import observer as ao

from repapq_plugin.observers import MinMaxObserver, PerChannelMinMaxObserver, RangeOptions

per_tensor_cases = [
    {"dtype": torch.quint8, "qscheme": torch.per_tensor_affine},
    {"dtype": torch.qint8, "qscheme": torch.per_tensor_affine},
    {"dtype": torch.quint8, "qscheme": torch.per_tensor_symmetric},
    {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric},
    {"dtype": torch.quint8, "qscheme": torch.per_tensor_affine, "quant_min": 0, "quant_max": 15},
    {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric, "quant_min": -7, "quant_max": 7},
    {"dtype": torch.qint8, "qscheme": torch.per_tensor_affine, "quant_min": -4, "quant_max": 3},
]


def stream(seed: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(3, generator=generator).exp()
    centre = torch.randn(3, generator=generator) * 2
    return [torch.randn(*shape, generator=generator) * spread[i] + centre[i] for i in range(3)]


def assert_same_qparams(ours: ao.ObserverBase, theirs: ao.ObserverBase, batches: list[torch.Tensor]) -> None:
    for batch in batches:
        ours(batch)
        theirs(batch)
    (scale, zero_point), (their_scale, their_zero_point) = ours.calculate_qparams(), theirs.calculate_qparams()
    assert torch.equal(scale, their_scale)
    assert zero_point.tolist() == their_zero_point.tolist()
    assert (zero_point.dtype, scale.shape) == (torch.int64, their_scale.shape)


@pytest.mark.parametrize("case", per_tensor_cases)
@given(seed=st.integers(0, 2**32 - 1))
def test_per_tensor(case: RangeOptions, seed: int) -> None:
    assert_same_qparams(MinMaxObserver(**case), ao.MinMaxObserver(**case), stream(seed, 4, 9))


@pytest.mark.parametrize("ch_axis", [0, 1, 2])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("quant_max", [127, 7])
@given(seed=st.integers(0, 2**32 - 1))
def test_per_channel(ch_axis: int, symmetric: bool, quant_max: int, seed: int) -> None:
    case = {
        "dtype": torch.qint8,
        "qscheme": torch.per_channel_symmetric if symmetric else torch.per_channel_affine,
        "ch_axis": ch_axis,
        "quant_min": -quant_max - 1,
        "quant_max": quant_max,
    }
    ours, theirs = PerChannelMinMaxObserver(**case), ao.PerChannelMinMaxObserver(**case)
    assert_same_qparams(ours, theirs, stream(seed, 3, 4, 5))


def test_a_per_channel_observer_takes_a_vector() -> None:
    observer = PerChannelMinMaxObserver(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
    observer(torch.tensor([-1.0, 0.5, 5.0]))  # torch.ao's own cannot
    assert observer.calculate_qparams()[0].tolist() == pytest.approx([1 / 127.5, 0.5 / 127.5, 5 / 127.5])


def test_defaults_are_theirs() -> None:
    pairs = ((MinMaxObserver(), ao.MinMaxObserver()), (PerChannelMinMaxObserver(), ao.PerChannelMinMaxObserver()))
    for ours, theirs in pairs:
        for key in ("dtype", "qscheme", "quant_min", "quant_max", "is_dynamic"):
            assert getattr(ours, key) == getattr(theirs, key)
