"""The ONNX file: its integers, its operators, what it computes, and what stops it from being written."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from repapq_plugin.errors import ExportError
from repapq_plugin.evaluation.runtimes import OnnxRuntimeNetwork
from repapq_plugin.export import deployable, export_onnx
from repapq_plugin.export.deploy import DeployedLayer
from tests.support.disk import largest_file
from tests.support.export_networks import (
    NETWORKS,
    Chain,
    Classifier,
    SharedHead,
    SharedInput,
    Tokens,
    example,
    float_copy,
    make,
    outputs_of,
    quantized,
    set_ranges,
)

BITS = [(8, 8), (4, 4), *(pytest.param(w, a, marks=pytest.mark.slow) for w, a in [(6, 6), (3, 5)])]


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize(("w", "a"), BITS)
def test_file_says_what_the_model_computes(kind: type[nn.Module], w: int, a: int, tmp_path: Path) -> None:
    model, x = make(kind, w, a)
    summary = export_onnx(model, x, tmp_path / "model.onnx")
    assert (summary.q_dq_pairs, summary.integer_layers) == (kind.pairs, kind.layers)
    assert summary.operators["QuantizeLinear"] == kind.pairs
    assert summary.operators["DequantizeLinear"] == kind.pairs + summary.weight_dq
    assert summary.operators.get("Clip", 0) == (kind.clamps if a < 8 else 0)
    assert summary.size_bytes == summary.path.stat().st_size
    # Node by node only the order of float additions differs: about 1e-7 a layer. A rounding flip
    # would be a step of the grid, 1e-3 at the very least; none of these networks has one.
    assert summary.max_rel_difference is not None
    assert summary.max_rel_difference < 1e-5


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize(("w", "a"), BITS)
def test_onnxruntime_computes_the_same_and_its_integers_stay_within_rounding(
    kind: type[nn.Module], w: int, a: int, tmp_path: Path
) -> None:
    model, x = make(kind, w, a)
    export_onnx(model, x, tmp_path / "model.onnx")
    exact = OnnxRuntimeNetwork(tmp_path / "model.onnx", threads=1)
    integer = OnnxRuntimeNetwork(tmp_path / "model.onnx", threads=1, arithmetic="integer")
    expected = outputs_of(model, x)
    for y, same, rounded in zip(expected, outputs_of(exact, x), outputs_of(integer, x), strict=True):
        assert (same - y).abs().max() < 1e-5 * y.abs().max()
        # Integer kernels round biases, so that a code here and there is another by one.
        error = (rounded - y).abs() / y.abs().max()
        assert error.median() < 1e-2
        assert error.max() < 2.0 ** (2 - min(w, a))


def weight_initializers(graph: onnx.GraphProto) -> list[np.ndarray]:
    return [numpy_helper.to_array(t) for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and t.dims]


@pytest.mark.parametrize("kind", NETWORKS)
def test_initializers_are_the_models_integers_and_nothing_float_is_left(kind: type[nn.Module], tmp_path: Path) -> None:
    model, x = make(kind, 4, 8)
    export_onnx(model, x, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    stored = [a for a in weight_initializers(graph) if a.ndim > 1]
    codes = [m.weight_codes.numpy() for m in deployable(model).modules() if isinstance(m, DeployedLayer)]
    assert len(stored) == len(codes)
    for wanted in codes:
        assert any(a.shape == wanted.shape and np.array_equal(a, wanted) for a in stored) or any(
            wanted.ndim == 2 and np.array_equal(a, wanted.T) for a in stored
        )
    kept = {m.weight.shape for m in model.modules() if type(m) is nn.Conv2d and m is getattr(model, "plain", None)}
    floats = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1]
    assert {tuple(t.dims) for t in floats} == {tuple(shape) for shape in kept}


def test_weights_take_a_quarter_of_the_float_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 64, 8, 8)
    model = nn.Sequential(*(quantized(nn.Conv2d(64, 64, 3, padding=1), 8, 8) for _ in range(4)))
    set_ranges(model, x)
    size = export_onnx(model, x, tmp_path / "model.onnx").size_bytes
    weights = sum(m.weight.numel() for m in model)
    assert weights < size < 1.1 * weights  # one byte each, and little else


def test_layers_that_read_one_tensor_share_a_pair_but_only_on_one_grid(tmp_path: Path) -> None:
    model, x = make(SharedInput, 4, 4)
    assert export_onnx(model, x, tmp_path / "shared.onnx").q_dq_pairs == 3
    own = model.right.input_fake_quant.__class__(quant_min=0, quant_max=15)
    own.set_qparams(2 * model.left.input_fake_quant.scale, model.left.input_fake_quant.zero_point)
    own.enable_observer(False)
    model.right.input_fake_quant = own
    summary = export_onnx(model, x, tmp_path / "own.onnx")
    assert summary.q_dq_pairs == 4
    assert summary.operators["Clip"] == 4


def test_operators_are_those_of_the_float_graph(tmp_path: Path) -> None:
    model, x = make(Classifier, 8, 8)
    plain = nn.Sequential(
        float_copy(model.stem), nn.ReLU(), model.plain, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        float_copy(model.hidden), nn.ReLU(), float_copy(model.scores),
    )  # fmt: skip
    floats = export_onnx(plain, x, tmp_path / "float.onnx")
    integers = dict(export_onnx(model, x, tmp_path / "int8.onnx").operators)
    assert (floats.q_dq_pairs, floats.weight_dq, floats.integer_layers) == (0, 0, 0)
    assert integers.pop("QuantizeLinear") == 3
    assert integers.pop("DequantizeLinear") == 6
    assert integers == dict(floats.operators)


def test_names_and_batch(tmp_path: Path) -> None:
    model, x = make(SharedHead, 8, 8)
    path = tmp_path / "model.onnx"
    export_onnx(model, x, path, input_names=["images"], output_names=["fine", "coarse"])
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == ["images"]
    assert [value.name for value in graph.output] == ["fine", "coarse"]
    more = example(SharedHead, seed=1).repeat(3, 1, 1, 1)
    assert [len(y) for y in outputs_of(OnnxRuntimeNetwork(path, threads=1), more)] == [6, 6]
    export_onnx(model, x, path, dynamic_batch=False)
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == ["input"]
    assert [value.name for value in graph.output] == ["output_0", "output_1"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    for wrong in (["one"], ["same", "same"]):
        with pytest.raises(ExportError, match=r"output_names=.*2 different names"):
            export_onnx(model, x, path, output_names=wrong)


def test_a_result_is_exported_through_its_model(tmp_path: Path) -> None:
    model, x = make(Chain, 8, 8)
    direct = export_onnx(model, x, tmp_path / "a.onnx")
    through = export_onnx(SimpleNamespace(model=model), (x,), str(tmp_path / "b.onnx"))
    assert direct.path.read_bytes() == through.path.read_bytes()
    with pytest.raises(ExportError, match="Cannot export a dict"):
        export_onnx({"model": model}, x, tmp_path / "c.onnx")


def test_the_same_model_gives_the_same_bytes_and_training_mode_stays(tmp_path: Path) -> None:
    model, x = make(Tokens, 3, 5)
    model.train()
    first = export_onnx(model, x, tmp_path / "a.onnx").path.read_bytes()
    assert export_onnx(model, x, tmp_path / "a.onnx").path.read_bytes() == first
    assert model.training


def test_parts_that_hold_the_folder_or_user_do_not_reach_the_file(tmp_path: Path) -> None:
    model, x = make(Chain, 8, 8)
    data = export_onnx(model, x, tmp_path / "model.onnx").path.read_bytes()
    assert str(tmp_path).encode() not in data
    assert b".py" not in data


def test_old_operator_sets_are_refused(tmp_path: Path) -> None:
    model, x = make(Chain, 8, 8)
    with pytest.raises(ExportError, match="opset=12"):
        export_onnx(model, x, tmp_path / "model.onnx", opset=12)


@pytest.mark.parametrize("opset", [13, 18])
def test_other_operator_sets(opset: int, tmp_path: Path) -> None:
    model, x = make(Chain, 4, 4)
    export_onnx(model, x, tmp_path / "model.onnx", opset=opset)
    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version == opset


def test_a_model_that_cannot_run_or_be_traced_is_an_export_error(tmp_path: Path) -> None:
    class Untraceable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(ExportError, match="cannot be traced"):
        export_onnx(Untraceable(), torch.randn(1, 2), tmp_path / "model.onnx")
    model, x = make(Chain, 8, 8)
    with pytest.raises(ExportError, match="cannot run on the example"):
        export_onnx(model, x[:, :2], tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_missing_package_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_onnx(name: str, *args: object, **kwargs: object) -> object:
        if name.split(".")[0] == "onnx":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    model, x = make(Chain, 8, 8)
    monkeypatch.setattr(builtins, "__import__", without_onnx)
    with pytest.raises(ExportError, match=r"pip install 'repapq-plugin\[export\]'"):
        export_onnx(model, x, tmp_path / "model.onnx")


def test_a_damaged_graph_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check is seen to fail: other integers, an operator too many, a quantizer too many."""
    from repapq_plugin.export import qdq_onnx

    tidy = qdq_onnx.tidy

    def damaged(change: Callable[[onnx.GraphProto], None]) -> Callable[[onnx.GraphProto], None]:
        def tidy_and_change(graph: onnx.GraphProto) -> None:
            tidy(graph)
            if any(node.op_type == "QuantizeLinear" for node in graph.node):
                change(graph)

        return tidy_and_change

    def other_integers(graph: onnx.GraphProto) -> None:
        tensor = next(t for t in graph.initializer if t.name.endswith("first.weight_codes"))
        tensor.raw_data = bytes(len(tensor.raw_data))

    def one_operator_more(graph: onnx.GraphProto) -> None:
        relu = next(node for node in graph.node if node.op_type == "Relu")
        added = onnx.helper.make_node("Neg", [relu.input[0]], ["added"])
        graph.node.insert(list(graph.node).index(relu), added)
        relu.input[0] = "added"

    def weight_without_dequantize(graph: onnx.GraphProto) -> None:
        conv = next(node for node in graph.node if node.op_type == "Conv")
        weight = np.zeros((8, 3, 3, 3), np.float32)
        graph.initializer.append(numpy_helper.from_array(weight, "float_weight"))
        conv.input[1] = "float_weight"

    model, x = make(Chain, 8, 8)
    for change, message in (
        (other_integers, r"first: the integer weights"),
        (one_operator_more, r"operators that the float graph lacks: \{'Neg': 1\}"),
        (weight_without_dequantize, r"2 layers with integer weights"),
    ):
        monkeypatch.setattr(qdq_onnx, "tidy", damaged(change))
        with pytest.raises(ExportError, match=message):
            export_onnx(model, x, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    model, x = make(Chain, 8, 8)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"what was here before")
    with largest_file(1000), pytest.raises(ExportError, match=r"Cannot write .*model\.onnx"):
        export_onnx(model, x, path)
    assert path.read_bytes() == b"what was here before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_an_export_error(tmp_path: Path) -> None:
    model, x = make(Chain, 8, 8)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ExportError, match=r"Cannot write .*file/model\.onnx"):
        export_onnx(model, x, tmp_path / "file" / "model.onnx")


def test_folders_are_made(tmp_path: Path) -> None:
    model, x = make(Chain, 8, 8)
    assert export_onnx(model, x, tmp_path / "a" / "b" / "model.onnx").path.is_file()
