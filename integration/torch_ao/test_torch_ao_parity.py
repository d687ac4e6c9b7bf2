"""Our min-max observers beside torch.ao's, on the cases that torch.ao tests its own with: equal bit for bit.

The cases are restated: every integer type, scheme and grid; values of one sign, of both, all equal, a single
one; several batches; tensors of two to five dimensions along each axis; empty batches; state that is saved
and loaded before, while and after observing.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, QConfig, QConfigMapping, observer
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from repapq_plugin.hosts import torch_ao
from repapq_plugin.observers import MinMaxObserver, PerChannelMinMaxObserver
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize, PerChannelLearnableFakeQuantize

TYPES = [torch.quint8, torch.qint8]
GRIDS: dict[torch.dtype, list[dict[str, int]]] = {
    torch.quint8: [{}, *({"quant_min": 0, "quant_max": 2**bits - 1} for bits in (2, 4, 5, 7))],
    torch.qint8: [
        {},
        *({"quant_min": -(2 ** (bits - 1)), "quant_max": 2 ** (bits - 1) - 1} for bits in (2, 3, 6)),
        *({"quant_min": -(2 ** (bits - 1)) + 1, "quant_max": 2 ** (bits - 1) - 1} for bits in (2, 4, 8)),
    ],
}
STREAMS: dict[str, list[list[float]]] = {
    "rising": [[1, 2, 2, 3, 4, 5, 6], [4, 5, 5, 6, 7, 8, 10]],
    "falling": [[-1, -2, -2, -3, -4, -5, -6], [-4, -5, -5, -6, -7, -8, -10]],
    "both signs": [[-3, 7, 0.5], [2.5, -9.25, 1e-3]],
    "zeros": [[0, 0, 0], [0, 0, 0]],
    "constant": [[2.5, 2.5], [2.5, 2.5]],
    "one value": [[-0.3], [0.7]],
    "tiny": [[1e-9, -3e-9], [2e-10, 0]],
    "huge": [[1e30, -1e28], [3e31, 0]],
    "nested": [[-5, 5], [-1, 1], [-7, 2]],
}
CHANNELS = torch.tensor(
    [
        [[[1.0, 2.0], [2.0, 2.5]], [[3.0, 4.0], [4.5, 6.0]]],
        [[[-4.0, -3.0], [5.0, 5.0]], [[6.0, 3.0], [7.0, 8.0]]],
        [[[0.0, 0.0], [0.0, 0.0]], [[-1.0, -2.0], [-0.5, 9.0]]],
    ]
)


def assert_equal_qparams(ours: nn.Module, theirs: nn.Module) -> None:
    (scale, zero_point), (their_scale, their_zero_point) = ours.calculate_qparams(), theirs.calculate_qparams()
    assert torch.equal(scale, their_scale)
    assert zero_point.tolist() == their_zero_point.tolist()


def assert_equal_ranges(ours: nn.Module, theirs: nn.Module) -> None:
    assert torch.equal(ours.min_val.reshape(-1), theirs.min_val.reshape(-1))
    assert torch.equal(ours.max_val.reshape(-1), theirs.max_val.reshape(-1))
    assert_equal_qparams(ours, theirs)


@pytest.mark.parametrize("stream", list(STREAMS))
@pytest.mark.parametrize("scheme", [torch.per_tensor_affine, torch.per_tensor_symmetric])
@pytest.mark.parametrize("dtype", TYPES)
def test_per_tensor(dtype: torch.dtype, scheme: torch.qscheme, stream: str) -> None:
    for grid in GRIDS[dtype]:
        # An unsigned grid has its middle between two codes: torch.ao takes the lower but for 8 bits, ours the upper.
        if dtype is torch.quint8 and scheme is torch.per_tensor_symmetric and grid:
            continue
        ours, theirs = (kind(dtype=dtype, qscheme=scheme, **grid) for kind in (MinMaxObserver, observer.MinMaxObserver))
        for batch in STREAMS[stream]:
            x = torch.tensor(batch)
            assert torch.equal(ours(x), theirs(x))
            assert_equal_ranges(ours, theirs)


@pytest.mark.parametrize("ch_axis", [0, 1, 2, 3])
@pytest.mark.parametrize("scheme", [torch.per_channel_affine, torch.per_channel_symmetric])
@pytest.mark.parametrize("dtype", TYPES)
def test_per_channel(dtype: torch.dtype, scheme: torch.qscheme, ch_axis: int) -> None:
    for grid in GRIDS[dtype]:
        if dtype is torch.quint8 and scheme is torch.per_channel_symmetric and grid:
            continue
        settings = {"dtype": dtype, "qscheme": scheme, "ch_axis": ch_axis, **grid}
        ours, theirs = PerChannelMinMaxObserver(**settings), observer.PerChannelMinMaxObserver(**settings)
        for batch in (CHANNELS, CHANNELS * -1.5, CHANNELS + 0.25):
            assert torch.equal(ours(batch), theirs(batch))
            assert_equal_ranges(ours, theirs)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3), (2, 4, 3, 3), (2, 3, 2, 4, 2)])
def test_shapes(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator)
    assert_equal_after(MinMaxObserver(), observer.MinMaxObserver(), x)
    for ch_axis in range(len(shape)):
        settings = {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric, "ch_axis": ch_axis}
        assert_equal_after(PerChannelMinMaxObserver(**settings), observer.PerChannelMinMaxObserver(**settings), x)


def assert_equal_after(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    for each in (x, x.transpose(0, 1), x[..., ::2], x.half().float()):
        if ours.min_val.numel() > 1 and each.shape[ours.ch_axis] != x.shape[ours.ch_axis]:
            continue
        ours(each), theirs(each)
    assert_equal_ranges(ours, theirs)


@pytest.mark.parametrize("dtype", TYPES)
def test_seven_bits_are_torch_aos_reduced_range(dtype: torch.dtype) -> None:
    bounds = {torch.quint8: (0, 127), torch.qint8: (-64, 63)}[dtype]
    ours = MinMaxObserver(dtype=dtype, quant_min=bounds[0], quant_max=bounds[1])
    theirs = observer.MinMaxObserver(dtype=dtype, reduce_range=True)
    for batch in STREAMS["both signs"]:
        ours(torch.tensor(batch)), theirs(torch.tensor(batch))
    assert_equal_ranges(ours, theirs)


def test_nothing_seen_and_empty_batches() -> None:
    ours, theirs = MinMaxObserver(), observer.MinMaxObserver()
    empty = torch.empty(2, 0)
    for each in (ours, theirs):
        assert each(empty) is empty
    assert_equal_qparams(ours, theirs)
    for each in (ours, theirs):
        each(torch.tensor([1.0, -2.0]))
        each(empty)
        each.reset_min_max_vals()
        each(torch.tensor([0.5, 3.0]))
    assert_equal_qparams(ours, theirs)


@pytest.mark.parametrize("seen", [0, 1, 2])
def test_state_goes_to_a_fresh_observer_and_on(seen: int) -> None:
    settings = {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric}
    for kinds, kwargs in (
        ((MinMaxObserver, observer.MinMaxObserver), {}),
        ((PerChannelMinMaxObserver, observer.PerChannelMinMaxObserver), settings),
    ):
        pair = [kind(**kwargs) for kind in kinds]
        fresh = [kind(**kwargs) for kind in kinds]
        for _ in range(seen):
            x = torch.randn(3, 4)
            for each in pair:
                each(x)
        for old, new in zip(pair, fresh, strict=True):
            assert new.load_state_dict(old.state_dict()) == ([], [])
        x = torch.randn(3, 4) * 2
        for each in fresh:
            each(x)
        assert_equal_ranges(*fresh)


@pytest.mark.parametrize("per_channel", [False, True])
def test_fake_quantizing_is_torch_aos(per_channel: bool) -> None:
    settings = {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric} if per_channel else {}
    kind = observer.PerChannelMinMaxObserver if per_channel else observer.MinMaxObserver
    bounds = {"quant_min": -127, "quant_max": 127} if per_channel else {"quant_min": 0, "quant_max": 255}
    theirs = FakeQuantize(observer=kind, **bounds, **settings)
    ours = (PerChannelLearnableFakeQuantize if per_channel else LearnableFakeQuantize)(**bounds)
    for _ in range(3):
        x = torch.randn(5, 7)
        mine, other = ours(x), theirs(x)
        # Ours keeps the logarithm of the scale: its last bit may differ, and with it a value on an edge.
        assert torch.allclose(mine, other, rtol=1e-5, atol=1e-6)
        assert torch.allclose(ours.scale, theirs.scale, rtol=1e-6)


def test_a_converted_network_is_the_same_with_either_observer() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    data = torch.randn(4, 3, 8, 8)
    weight = {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric}
    outputs = []
    for tensor, channel in (
        (MinMaxObserver, PerChannelMinMaxObserver),
        (observer.MinMaxObserver, observer.PerChannelMinMaxObserver),
    ):
        qconfig = QConfig(activation=tensor.with_args(quant_min=0, quant_max=127), weight=channel.with_args(**weight))
        prepared = prepare_fx(copy.deepcopy(network), QConfigMapping().set_global(qconfig), (data,))
        prepared(data)
        with torch_ao.integer_engine("x86"):
            outputs.append(convert_fx(prepared)(data))
    assert torch.equal(*outputs)


# What becomes of a converted network


def test_a_converted_network_is_saved_scripted_and_traced(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    data = torch.randn(4, 3, 8, 8)
    prepared = prepare_fx(network, torch_ao.repapq_qconfig_mapping("w4a4", "x86"), (data,))
    prepared(data)
    with torch_ao.integer_engine("x86"), torch.no_grad():
        converted = torch_ao.convert_to_int8(prepared, "x86")
        expected = converted(data)
        for made in (torch.jit.script(converted), torch.jit.trace(converted, data)):
            torch.jit.save(made, tmp_path / "network.pt")
            assert torch.equal(torch.jit.load(tmp_path / "network.pt")(data), expected)
        other = torch_ao.convert_to_int8(prepared, "x86")
        other.load_state_dict(converted.state_dict())
        assert torch.equal(other(data), expected)
        assert torch.equal(copy.deepcopy(converted)(data), expected)


def test_a_prepared_graph_goes_on_where_its_state_was_saved() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    data = torch.randn(4, 3, 8, 8)
    mapping = torch_ao.repapq_qconfig_mapping("w6a6", "x86")
    first, second = (prepare_fx(copy.deepcopy(network), mapping, (data,)) for _ in range(2))
    first(data)
    assert second.load_state_dict(first.state_dict()) == ([], [])
    for each in (first, second, copy.deepcopy(first)):
        each(2 * data)
    with torch_ao.integer_engine("x86"):
        one, other = (torch_ao.convert_to_int8(each, "x86")(data) for each in (first, second))
    assert torch.equal(one, other)
