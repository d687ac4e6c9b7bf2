"""The batch of a file is open only where another batch size really runs."""

from __future__ import annotations

import builtins
import logging
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from repapq_plugin.evaluation.runtimes import OnnxRuntimeNetwork, OpenVINONetwork
from repapq_plugin.export import export_onnx, export_openvino
from repapq_plugin.export.calls import Call
from repapq_plugin.export.onnx_batch import parts_of, reason_against, run_second_batch
from tests.support.export_networks import Chain, make, outputs_of, quantized, set_ranges


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = quantized(nn.Conv2d(3, 4, 3, padding=1), 7, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Traced(Body):
    """The number of samples becomes a number of the graph: torch runs any batch, the graph one."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + torch.cat([torch.full((1, 1, 1, 1), float(i)) for i in range(int(x.shape[0]))])


class Looped(Body):
    """One sample after the other, as some heads do."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.conv(x[i : i + 1]).mean((0, 2, 3)) for i in range(len(x))])


class Numbered(Body):
    """The batch size itself is a factor: the shape is right with another one, and the values are not."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * float(len(x))


class Written(Body):
    """The batch size stands in the module, so that torch itself runs no other."""

    def __init__(self, n: int = 2) -> None:
        super().__init__()
        self.n = n

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(self.n, 4, 6, 6)


class Listed(Body):
    """One output for each sample."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.conv(x)[i] for i in range(len(x))]


class Flat(Body):
    """Samples and places in one axis."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return y.permute(0, 2, 3, 1).reshape(-1, 4), torch.arange(5)


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("kind", [Traced, Looped, Numbered, Written, Listed])
@pytest.mark.parametrize("n", [2, 1])
def test_a_batch_that_is_part_of_the_graph_is_fixed_and_said(
    kind: type[nn.Module], n: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    x = images(n)
    model = set_ranges(kind(n) if kind is Written else kind(), x)
    with caplog.at_level(logging.WARNING):
        summary = export_onnx(model, x, tmp_path / "model.onnx")
    assert not summary.dynamic_batch
    assert any("batch size is fixed to the example's" in note for note in summary.notes)
    assert "batch size is fixed to the example's" in caplog.text
    graph = onnx.load(summary.path).graph
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_value == n
    assert summary.max_rel_difference is not None
    assert summary.max_rel_difference < 1e-5


def test_a_factor_that_another_sample_hardly_changes_is_seen(tmp_path: Path) -> None:
    x = images(12)
    assert not export_onnx(set_ranges(Numbered(), x), x, tmp_path / "model.onnx").dynamic_batch


class Mixing(Body):
    """What a sample gets depends a little on the others."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + 0.1 * y.mean(0, keepdim=True)


def test_a_model_that_mixes_samples_is_compared_with_the_graph_alone(tmp_path: Path) -> None:
    model = set_ranges(Mixing(), images())
    assert parts_of(model, Call((images(),), {})) == ()
    summary = export_onnx(model, images(), tmp_path / "model.onnx")
    assert summary.dynamic_batch
    [got] = outputs_of(OnnxRuntimeNetwork(summary.path, threads=1), images(5))
    assert torch.allclose(got, model(images(5)), atol=1e-5)


def rounding_otherwise(call: Call, by_sample: bool) -> list[Tensor]:
    """What a runtime returns that rounds some sums of a random network otherwise: 5 % off, more or less."""
    [x] = call.tensors
    seeds = [int(1e6 * row.double().abs().sum()) if by_sample else 100 * len(x) + i for i, row in enumerate(x)]
    flips = [0.05 * torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return [x + torch.stack(flips), torch.arange(5)]


@pytest.mark.parametrize(("by_sample", "may_be_open"), [(True, True), (False, False)])
@pytest.mark.parametrize("n", [1, 3])
def test_a_runtime_that_rounds_otherwise_is_held_against_itself(n: int, by_sample: bool, may_be_open: bool) -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.clone(), torch.arange(5)

    call = Call((images(n),), {})
    second = run_second_batch(Same(), call, list(Same()(images(n))))
    parts = parts_of(Same(), call)
    assert [[part.call.tensors[0].shape[0], *part.rows] for part in parts] == [
        [n, slice(None, n), slice(None, 5)],
        [n, slice(-n, None), slice(-5, None)],
    ]
    assert torch.equal(parts[1].call.tensors[0], second.call.tensors[0][1:])
    reason = reason_against(lambda made: rounding_otherwise(made, by_sample), second, lambda: parts)
    assert (reason == "") == may_be_open
    assert reason_against(lambda made: rounding_otherwise(made, by_sample), second, lambda: ())
    # The shape is right, and samples are in each other's places.
    assert reason_against(lambda made: [made.tensors[0].flip(0).neg(), torch.arange(5)], second, lambda: parts)


def test_what_runs_with_two_sizes_runs_with_others(tmp_path: Path) -> None:
    model = set_ranges(Flat(), images())
    summary = export_onnx(model, images(), tmp_path / "model.onnx")
    assert summary.dynamic_batch
    assert summary.notes == ()
    graph = onnx.load(summary.path).graph
    image, rows, numbers = (v.type.tensor_type.shape.dim for v in (*graph.input, *graph.output))
    assert [d.dim_param or d.dim_value for d in image] == ["batch", 3, 6, 6]
    assert rows[0].dim_param == "output_0_0"  # samples times places: another length than the batch's
    assert [d.dim_value for d in numbers] == [5]
    for n in (1, 5):
        got = outputs_of(OnnxRuntimeNetwork(summary.path, threads=1), images(n))
        for y, wanted in zip(got, outputs_of(model, images(n)), strict=True):
            assert (y - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_fixed_batch_that_was_asked_for_needs_no_note(tmp_path: Path) -> None:
    model, x = make(Chain, 8, 8)
    fixed = export_onnx(model, x, tmp_path / "model.onnx", dynamic_batch=False)
    assert (fixed.dynamic_batch, fixed.notes) == (False, ())
    assert export_onnx(model, x, tmp_path / "model.onnx").dynamic_batch


@pytest.mark.parametrize(("kind", "is_open"), [(Traced, False), (Flat, True)])
def test_openvino_says_it_too(kind: type[nn.Module], is_open: bool, tmp_path: Path) -> None:
    model = set_ranges(kind(), images())
    summary = export_openvino(model, images(), tmp_path / "model.xml")
    assert summary.dynamic_batch == is_open
    assert any("batch size is fixed" in note for note in summary.notes) != is_open
    if is_open:
        got = outputs_of(OpenVINONetwork(summary.path, threads=1), images(4))
        for y, wanted in zip(got, outputs_of(model, images(4)), strict=True):
            assert (y - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_compiled_model_that_fails_with_another_batch_is_written_with_a_fixed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from repapq_plugin.export import openvino

    run = openvino._run
    model, x = make(Chain, 7, 8)

    def only_the_example(compiled: object, call: object, model: nn.Module) -> list[Tensor]:
        results = run(compiled, call, model)
        return results if len(results[0]) == len(x) else [torch.zeros_like(results[0])]

    monkeypatch.setattr(openvino, "_run", only_the_example)
    summary = export_openvino(model, x, tmp_path / "model.xml")
    assert not summary.dynamic_batch
    assert "fixed to the example's in OpenVINO: for another one the graph computes something else" in summary.notes[0]
    assert not OpenVINONetwork(summary.path, threads=1).compiled.inputs[0].partial_shape.is_dynamic


def test_without_onnxruntime_the_torch_network_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_runtime(name: str, *args: object, **kwargs: object) -> object:
        if name.split(".")[0] == "onnxruntime":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_runtime)
    for kind, is_open in ((Written, False), (Flat, True)):
        summary = export_onnx(set_ranges(kind(), images()), images(), tmp_path / "model.onnx")
        assert summary.dynamic_batch == is_open
        assert summary.max_rel_difference is None


def test_only_axes_of_the_batch_are_open(tmp_path: Path) -> None:
    class WithTable(Body):
        def forward(self, x: Tensor, table: Tensor, factor: Tensor) -> Tensor:
            return self.conv(x).flatten(1) @ table * factor

    args = (images(), torch.randn(144, 5), torch.tensor(2.0))
    model = set_ranges(WithTable(), *args)
    summary = export_onnx(model, args, tmp_path / "model.onnx")
    assert summary.dynamic_batch
    graph = onnx.load(summary.path).graph
    assert [v.type.tensor_type.shape.dim[0].dim_param for v in graph.input if v.type.tensor_type.shape.dim] == [
        "batch",
        "",
    ]
