"""Programs in torch's quantize and dequantize operators: what they compute, and where they round."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.errors import ExportError
from repapq_plugin.evaluation.mobile import ExecuTorchNetwork, LiteRTNetwork
from repapq_plugin.export import export_executorch, export_litert, load_program, quantized_program
from repapq_plugin.export.program_grids import DEQUANTIZE, QUANTIZE, layer_calls, roundings
from tests.support.export_networks import NETWORKS, Chain, Residual, make, outputs_of

BITS = [(8, 8), *(pytest.param(w, a, marks=pytest.mark.slow) for w, a in [(4, 4), (3, 5)])]


class Joined(nn.Module):
    """A concatenation, pooling, a mean and a linear layer behind convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.third, self.last = nn.Conv2d(16, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.first(x).relu(), 2)
        return self.last(self.third(torch.cat([x, self.second(x).relu()], 1)).relu().mean((2, 3)))


def batches() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(4, 3, 12, 12) for _ in range(3)]


def joined(preset: str, target: str = "executorch") -> nn.Module:
    torch.manual_seed(1)
    config = RepAPQConfig.from_preset(preset, target=target, steps=3, first_last_bits=None)
    return quantize_model(Joined().eval(), batches(), config).model


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize(("w", "a"), BITS)
def test_a_program_computes_what_the_network_does(kind: type[nn.Module], w: int, a: int) -> None:
    model, x = make(kind, w, a)
    program = quantized_program(model, x, round_biases=False)
    assert len(program.layers) == kind.layers
    for output, expected in zip(outputs_of(program.graph, *program.inputs), outputs_of(model, x), strict=True):
        assert (output - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("target", ["generic", "executorch"])
@pytest.mark.parametrize("preset", ["w8a8", "w4a4"])
def test_activations_are_int8_whatever_grid_a_result_has(preset: str, target: str) -> None:
    model, x = joined(preset, target), batches()[0]
    program = quantized_program(model, x, round_biases=False)
    assert torch.equal(program.graph(x), model(x))
    quantizing = [node for node in program.graph.graph.nodes if node.target is QUANTIZE]
    assert quantizing and all(node.args[3:] == (-128, 127, torch.int8) for node in quantizing)


def test_layers_are_named_and_those_with_unrounded_outputs_told_apart() -> None:
    program = quantized_program(joined("w8a8"), batches()[0])
    assert program.layers == ("first", "second", "third", "last")
    # The first is read by a convolution and by the concatenation, each on a grid of its own.
    assert program.float_outputs == ("first", "third", "last")


@pytest.mark.parametrize("preset", ["w8a8", "w4a4"])
def test_batches_round_every_output(preset: str) -> None:
    model, data = joined(preset), batches()
    program = quantized_program(model, data[0], batches=data)
    assert program.float_outputs == ()
    output, expected = program.graph(data[0]), model(data[0])
    assert 0 < (output - expected).abs().max() < 0.2 * expected.abs().max()
    last = max(
        roundings(program.graph.graph), key=lambda rounding: list(program.graph.graph.nodes).index(rounding.last)
    )
    low, high = expected.aminmax()
    assert 255 * last.grid.scale == pytest.approx(float(high - low), rel=0.5)


def test_each_reader_has_a_dequantize_operator_of_its_own() -> None:
    program = quantized_program(joined("w8a8"), batches()[0], batches=batches())
    assert all(len(node.users) == 1 for node in program.graph.graph.nodes if node.target is DEQUANTIZE)


@pytest.mark.parametrize("preset", ["w8a8", "w4a4"])
def test_biases_of_integer_layers_are_whole_numbers_of_steps(preset: str) -> None:
    graph = quantized_program(joined(preset), batches()[0], batches=batches()).graph
    layers = layer_calls(graph)
    assert len(layers) == 4
    for layer in layers:
        source, weight, bias = layer.args[:3]
        scale = graph.get_buffer(weight.args[1].target).double() * source.args[1]
        rounded = graph.get_buffer(bias.target)
        assert torch.equal(rounded, ((rounded.double() / scale).round() * scale).float())
        assert rounded.abs().max() > 0


def test_the_network_is_left_as_it_is() -> None:
    model, data = joined("w4a4"), batches()
    before = copy.deepcopy(model.state_dict())
    quantized_program(model, data[0], batches=data)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_program_comes_back_from_its_file(tmp_path: Path) -> None:
    data = batches()
    wide = torch.cat([data[0]] * 50)[:4]  # a view of far more
    program = quantized_program(joined("w4a4"), wide)
    summary = program.save(tmp_path / "model.pt2")
    again = load_program(summary.path)
    assert (again.layers, again.float_outputs) == (program.layers, program.float_outputs)
    assert torch.equal(again.graph(data[1]), program.graph(data[1]))
    assert all(torch.equal(a, b) for a, b in zip(again.inputs, program.inputs, strict=True))
    assert summary.size_bytes == summary.path.stat().st_size < 200_000


@pytest.mark.parametrize("read", [load_program, ExecuTorchNetwork, LiteRTNetwork])
def test_a_file_that_is_not_there_or_a_package_is_refused(read: type, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="There is no file|This needs"):
        read(tmp_path / "model.pt2")


def test_what_is_no_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(b"nothing")
    with pytest.raises(ExportError, match="cannot be read as a program"):
        load_program(tmp_path / "model.pt2")


@pytest.mark.parametrize(
    ("export", "package"), [(export_executorch, "executorch"), (export_litert, "litert-torch")], ids=["pte", "tflite"]
)
def test_a_missing_package_is_named(
    export: object, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in ("executorch", "litert"):
        monkeypatch.setattr(f"repapq_plugin.export.{module}.find_spec", lambda name: None)
    model, x = make(Chain, 8, 8)
    with pytest.raises(ExportError, match=f"needs the {package} package: pip install"):
        export(model, x, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_followed_is_refused_by_layer() -> None:
    class Deciding(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    torch.manual_seed(0)
    model, x = make(Deciding, 8, 8)
    with pytest.raises(ExportError, match=r"torch\.export cannot follow the model"):
        quantized_program(model, x)


def test_a_name_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from repapq_plugin.cli import main

    assert main(["lower", str(tmp_path / "model.pt2"), str(tmp_path / "model.onnx")]) == 1
    assert "end it in .pte or .tflite" in capsys.readouterr().err.replace("\n", " ")
