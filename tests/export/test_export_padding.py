"""Every kind of layer, however it pads and is called: runtimes compute what the simulation does, and in integers."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from repapq_plugin.export import deployable, export_onnx, export_openvino
from repapq_plugin.export.onnx_padding import move_codes, spell_out_padding
from repapq_plugin.quantizers.own_forward import bake_weights
from tests.support.export_networks import outputs_of, quantized, set_ranges


class SamePadded(nn.Conv2d):
    """Pads as TensorFlow does, by the size of its input."""

    def forward(self, input: Tensor) -> Tensor:
        pads = []
        for size, kernel, stride in zip(input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return functional.conv2d(functional.pad(input, pads), self.weight, self.bias, self.stride)


class Standardized(nn.Conv2d):
    """Multiplies twice its weight, each channel without its mean."""

    def forward(self, input: Tensor) -> Tensor:
        weight = 2 * (self.weight - self.weight.mean((1, 2, 3), keepdim=True))
        return self._conv_forward(input, weight, self.bias)


class PaddedWithOnes(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return functional.conv2d(functional.pad(input, [1, 1, 1, 1], value=1.0), self.weight, self.bias)


class ByKeyword(nn.Module):
    def __init__(self, layer: nn.Module, **kwargs: object) -> None:
        super().__init__()
        self.layer, self.kwargs = layer, kwargs

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(input=x, **self.kwargs)


LAYERS = {
    "same": lambda: nn.Conv2d(8, 8, 3, padding="same"),
    "same, even": lambda: nn.Conv2d(8, 8, 4, padding="same"),
    "same, even, dilated": lambda: nn.Conv2d(8, 8, 4, padding="same", dilation=3),
    "same, uneven": lambda: nn.Conv2d(8, 8, (2, 3), padding="same", dilation=(1, 2)),
    "valid": lambda: nn.Conv2d(8, 8, 3, padding="valid"),
    "reflect": lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    "reflect, same, even": lambda: nn.Conv2d(8, 8, 4, padding="same", padding_mode="reflect"),
    "replicate, depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="replicate", groups=8),
    "circular, one axis": lambda: nn.Conv2d(8, 8, 3, padding=(0, 1), padding_mode="circular"),
    "circular": lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
    "own padding": lambda: SamePadded(8, 8, 4),
    "own padding, strided": lambda: SamePadded(8, 8, 3, 2),
    "baked": lambda: Standardized(8, 8, 3, padding=1),
    "baked, reflect": lambda: Standardized(8, 8, 3, padding=1, padding_mode="reflect"),
    "keyword": lambda: ByKeyword(nn.Conv2d(8, 8, 3, padding=1)),
    "1d": lambda: nn.Conv1d(8, 8, 3, padding=1),
    "1d, same, even": lambda: nn.Conv1d(8, 8, 4, padding="same"),
    "1d, circular": lambda: nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular"),
    "3d": lambda: nn.Conv3d(8, 8, 3, padding=1),
    "3d, replicate": lambda: nn.Conv3d(8, 8, 3, padding=1, padding_mode="replicate"),
}
KINDS = {"1d": nn.Conv1d, "3d": nn.Conv3d}
SHAPES = {"1d": (2, 3, 9), "2d": (2, 3, 9, 7), "3d": (2, 3, 5, 6, 7)}


def around(name: str, bits: int = 7, input_bits: int = 8) -> tuple[nn.Module, Tensor]:
    """Return a network with one of `LAYERS` in its middle, quantized, and an input."""
    torch.manual_seed(len(name))
    dims = name[:2] if name[:2] in SHAPES else "2d"
    kind = KINDS.get(dims, nn.Conv2d)
    x = torch.randn(SHAPES[dims])
    model = nn.Sequential(kind(3, 8, 1), nn.ReLU(), LAYERS[name](), nn.ReLU(), kind(8, 4, 1)).eval()
    bake_weights(model, lambda: model(x))
    for module in list(model.modules()):
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            quantized(module, bits, input_bits)
    return set_ranges(model, x), x


def operators_run(path: Path) -> list[str]:
    """Return what onnxruntime makes of a file, all optimizations on."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("bits", "input_bits"), [(7, 8), pytest.param(4, 4, marks=pytest.mark.slow)])
def test_onnx_computes_the_simulation_in_integers(name: str, bits: int, input_bits: int, tmp_path: Path) -> None:
    model, x = around(name, bits, input_bits)
    assert all(torch.equal(a, b) for a, b in zip(outputs_of(deployable(model), x), outputs_of(model, x), strict=True))
    summary = export_onnx(model, x, tmp_path / "model.onnx")
    assert (summary.integer_layers, summary.float_inputs) == (3, 0)
    assert summary.q_dq_pairs == 3
    assert summary.dynamic_batch
    assert summary.notes == ()
    assert summary.max_rel_difference is not None
    assert summary.max_rel_difference < 1e-5
    if input_bits == 8:
        # The last layer's output stays float, so that onnxruntime computes it in floating point.
        assert operators_run(summary.path).count("QLinearConv") == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_openvino_computes_the_simulation_in_integers(name: str, tmp_path: Path) -> None:
    model, x = around(name)
    summary = export_openvino(model, x, tmp_path / "model.xml")
    assert summary.integer_layers == 3
    assert len([kernel for kernel in summary.kernels.values() if kernel.endswith("I8")]) == 3
    assert summary.notes == ()
    assert summary.max_rel_difference is not None
    assert summary.max_rel_difference < 1e-5


def test_other_values_than_zeros_are_padded_in_floating_point_and_that_is_said(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 6, 6)
    layers = [quantized(layer, 7, 8) for layer in (nn.Conv2d(3, 8, 1), PaddedWithOnes(8, 8, 3), nn.Conv2d(8, 4, 1))]
    model = set_ranges(nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]), x)
    summary = export_onnx(model, x, tmp_path / "model.onnx")
    assert (summary.integer_layers, summary.float_inputs) == (3, 1)
    assert summary.notes == ("These layers with integer weights read their input in floating point: 2.",)
    assert summary.max_rel_difference is not None
    assert summary.max_rel_difference < 1e-5
    compiled = export_openvino(model, x, tmp_path / "model.xml")
    assert compiled.max_rel_difference is not None
    assert compiled.max_rel_difference < 1e-5
    assert "2 of 3 layers with integer weights run in 8-bit integers" in compiled.notes[-1]
    assert "/2/Conv" in compiled.notes[-1]


@pytest.mark.parametrize("size", [11, 12])
@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_output_sizes_of_transposed_convolutions(size: int, how: str, tmp_path: Path) -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = quantized(nn.Conv2d(3, 8, 3, 2, 1), 7, 8)
            self.up = quantized(nn.ConvTranspose2d(8, 4, 3, 2, 1), 7, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.down(x).relu()
            return self.up(y, [size, size]) if how == "positional" else self.up(y, output_size=x.shape[-2:])

    torch.manual_seed(0)
    x = torch.randn(2, 3, size, size)
    model = set_ranges(Up(), x)
    summary = export_onnx(model, x, tmp_path / "model.onnx")
    assert (summary.integer_layers, summary.float_inputs) == (2, 0)
    assert summary.max_rel_difference is not None
    assert summary.max_rel_difference < 1e-5
    compiled = export_openvino(model, x, tmp_path / "model.xml", dynamic_batch=False)
    assert len([kernel for kernel in compiled.kernels.values() if kernel.endswith("I8")]) == 2
    assert compiled.max_rel_difference is not None
    assert compiled.max_rel_difference < 1e-5


def test_two_layers_that_pad_one_tensor_share_its_codes(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = quantized(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), 7, 8)
            self.b = quantized(nn.Conv2d(3, 4, 1), 7, 8, self.a.input_fake_quant)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    x = torch.randn(2, 3, 6, 6)
    summary = export_onnx(set_ranges(Two(), x), x, tmp_path / "model.onnx")
    assert (summary.q_dq_pairs, summary.integer_layers, summary.float_inputs) == (1, 2, 0)
    assert summary.max_rel_difference is not None
    assert summary.max_rel_difference < 1e-5


def graph_with_pad(*, value: float = 0.0, shown: bool = False, mode: str = "constant") -> onnx.GraphProto:
    """Return a convolution that reads a padded quantized tensor, which may be an output as well."""
    helper = onnx.helper
    stored = {
        "scale": torch.tensor(0.1),
        "zero": torch.tensor(3, dtype=torch.uint8),
        "codes": torch.ones(1, 1, 1, 1, dtype=torch.int8),
        "unit": torch.tensor(1.0),
        "none": torch.tensor(0, dtype=torch.int8),
        "pads": torch.tensor([0, 0, 1, 1, 0, 0, 1, 1]),
        "value": torch.tensor(value),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
        helper.make_node("DequantizeLinear", ["codes", "unit", "none"], ["weight"]),
        helper.make_node("Pad", ["dq", "pads", "value"], ["padded"], mode=mode),
        helper.make_node("Conv", ["padded", "weight"], ["y"], kernel_shape=[1, 1]),
    ]
    info = helper.make_tensor_value_info
    outputs = [info(name, 1, [1, 1, 4, 4]) for name in ("y", *(["padded"] if shown else []))]
    tensors = [onnx.numpy_helper.from_array(t.numpy(), name) for name, t in stored.items()]
    return helper.make_graph(nodes, "g", [info("x", 1, [1, 1, 2, 2])], outputs, tensors)


@pytest.mark.parametrize(
    ("changes", "moves"),
    [({}, True), ({"value": 1.0}, False), ({"shown": True}, False), ({"value": 1.0, "mode": "edge"}, True)],
)
def test_codes_are_padded_only_where_the_meaning_stays(changes: dict[str, object], moves: bool) -> None:
    graph = graph_with_pad(**changes)
    x = torch.randn(1, 1, 2, 2).numpy()

    def run() -> list[Tensor]:
        proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
        onnx.checker.check_model(proto, full_check=True)
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        return [torch.as_tensor(y) for y in session.run(None, {"x": x})]

    before = run()
    move_codes(graph)
    conv = next(node for node in graph.node if node.op_type == "Conv")
    assert (conv.input[0] == "padded.dequantized") == moves
    assert all(torch.equal(a, b) for a, b in zip(run(), before, strict=True))


@pytest.mark.parametrize(
    ("auto", "pads"),
    [("SAME_UPPER", [1, 3, 2, 3]), ("SAME_LOWER", [2, 3, 1, 3]), ("VALID", [0, 0, 0, 0]), ("NOTSET", None)],
)
def test_automatic_padding_is_spelled_out(auto: str, pads: list[int] | None) -> None:
    helper = onnx.helper
    node = helper.make_node(
        "Conv", ["x", "w"], ["y"], auto_pad=auto, kernel_shape=[4, 3], dilations=[1, 3], strides=[1, 1]
    )
    graph = helper.make_graph([node], "g", [], [])
    spell_out_padding(graph)
    found = {a.name: helper.get_attribute_value(a) for a in graph.node[0].attribute}
    assert found.get("pads") == pads
    assert ("auto_pad" in found) == (pads is None)
    strided = helper.make_node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", kernel_shape=[4], strides=[2])
    graph = helper.make_graph([strided], "g", [], [])
    spell_out_padding(graph)  # depends on the size of the input
    assert graph.node[0] == strided
