"""Layers that hold the same integers: every name in the file is given once, and every mode of a runtime loads it."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import onnx
import onnxruntime
import openvino
import pytest
import torch
from torch import Tensor, nn

from repapq_plugin.core.onnx_weights import GraphNamer, separate_weights
from repapq_plugin.evaluation.runtimes import OnnxRuntimeNetwork
from repapq_plugin.export import export_onnx
from tests.support.export_networks import outputs_of, quantized, set_ranges

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


class Alike(nn.Module):
    """Three calls of layers whose weights have equal codes.

    Args:
        kind: ``equal`` weights; one parameter that is ``tied``; weights that are multiples and so have the codes,
            but not the scales (``scaled``); one layer that is ``called`` each time.
        linear: Linear layers instead of convolutions.
        bits: Of the weights.
    """

    def __init__(self, kind: str, linear: bool, bits: int) -> None:
        super().__init__()
        self.stem = quantized(nn.Linear(6, 8) if linear else nn.Conv2d(6, 8, 1), bits, 8)
        first = nn.Linear(8, 8) if linear else nn.Conv2d(8, 8, 3, padding=1)
        layers = [first, *(first if kind == "called" else copy.deepcopy(first) for _ in range(2))]
        for i, layer in enumerate(layers[1:], start=1):
            if kind == "tied":
                layer.weight = first.weight
            if kind == "scaled":
                layer.weight.data.mul_(2**i)
        made = {layer: quantized(layer, bits, 8) for layer in layers}
        self.a, self.b, self.c = (made[layer] for layer in layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.stem(x).relu()
        return self.a(x), self.b(x + 1), self.c(self.b(x + 2).relu())


SHAPES = {"images": (2, 6, 5, 5), "features": (3, 6), "tokens": (2, 5, 6)}


@pytest.mark.parametrize("bits", [8, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (7, 4))])
@pytest.mark.parametrize("kind", ["equal", "tied", "scaled", "called"])
@pytest.mark.parametrize("data", ["images", pytest.param("features", marks=pytest.mark.slow), "tokens"])
def test_layers_of_equal_codes_are_valid_everywhere(data: str, kind: str, bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(SHAPES[data])
    model = set_ranges(Alike(kind, data != "images", bits), x)
    summary = export_onnx(model, x, tmp_path / "model.onnx")
    assert summary.integer_layers == 5
    assert summary.max_rel_difference is not None
    assert summary.max_rel_difference < 1e-5
    proto = onnx.load(summary.path)
    onnx.checker.check_model(proto, full_check=True)
    names = [t.name for t in proto.graph.initializer]
    assert len(set(names)) == len(names)
    expected = outputs_of(model, x)
    for level, exact in itertools.product(LEVELS, (False, True)):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        if exact:
            options.add_session_config_entry("session.x64quantprecision", "1")
        session = onnxruntime.InferenceSession(str(summary.path), options, providers=["CPUExecutionProvider"])
        for got, wanted in zip(session.run(None, {"input": x.numpy()}), expected, strict=True):
            # Integer kernels round biases, so that a code here and there is another by one.
            assert (torch.as_tensor(got) - wanted).abs().median() < 2e-2 * wanted.abs().max()
    compiled = openvino.Core().compile_model(str(summary.path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert len(compiled(x.numpy())) == 3


@pytest.mark.parametrize("kind", ["equal", "called"])
def test_weights_of_seven_bits_are_stored_once(kind: str, tmp_path: Path) -> None:
    """No runtime rewrites them, so that copies would only cost room."""
    torch.manual_seed(0)
    x = torch.randn(SHAPES["images"])
    stored = {}
    for bits in (7, 8):
        path = export_onnx(set_ranges(Alike(kind, False, bits), x), x, tmp_path / f"{bits}.onnx").path
        tensors = onnx.load(path).graph.initializer
        stored[bits] = sum(t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1 for t in tensors)
    assert stored == {7: 2, 8: 5}


def test_files_of_others_are_separated_when_they_are_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(SHAPES["images"])
    model = set_ranges(Alike("called", False, 8), x)
    path = export_onnx(model, x, tmp_path / "model.onnx").path
    proto = onnx.load(path)
    first = next(n for n in proto.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == "a.weight_codes")
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0].startswith("a.weight_codes."):
            node.input[0], node.input[2] = first.input[0], first.input[2]
    onnx.save(proto, path)
    for got, wanted in zip(outputs_of(OnnxRuntimeNetwork(path, threads=1), x), outputs_of(model, x), strict=True):
        assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_names_that_are_taken_are_not_given_again() -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"], name="x.2")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, [1])], [value("y", 1, [1])])
    namer = GraphNamer(graph)
    assert [namer.fresh(name) for name in ("x", "x", "y", "new", "new")] == ["x.3", "x.4", "y.2", "new", "new.2"]
    before = graph.SerializeToString()
    separate_weights(graph)
    assert graph.SerializeToString() == before
