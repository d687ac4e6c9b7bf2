"""ExecuTorch and LiteRT: what their files hold, and what their runtimes compute beside the program's simulation."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from repapq_plugin import RepAPQConfig, quantize_model
from repapq_plugin.cli import main
from repapq_plugin.errors import ExportError
from repapq_plugin.evaluation.mobile import ExecuTorchNetwork, LiteRTNetwork
from repapq_plugin.evaluation.runtimes import RuntimeNetwork
from repapq_plugin.export import QuantizedProgram, export_executorch, export_litert, quantized_program
from repapq_plugin.export.litert import LiteRTFile
from repapq_plugin.export.program_grids import roundings


class Network(nn.Module):
    """Strides, a depthwise layer, a shortcut, a concatenation, pooling, a mean and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.second, self.third = nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 3, padding=1)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = functional.max_pool2d(self.depthwise(x).relu(), 2)
        y = torch.cat([y, self.second(y).relu()], 1)
        return self.last(self.third(y).relu().mean((2, 3)))


class Chain(Network):
    """The same layers with nothing that is read twice."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.depthwise(self.stem(x).relu()).relu()).relu()
        return self.last(self.third(torch.cat([x, x], 1)).relu().mean((2, 3)))


def batches() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(8, 3, 16, 16) for _ in range(4)]


def program_of(
    preset: str, rounded: bool = True, network: type[nn.Module] = Network
) -> tuple[nn.Module, QuantizedProgram]:
    torch.manual_seed(1)
    data = batches()
    config = RepAPQConfig.from_preset(preset, target="executorch", steps=5)
    model = quantize_model(network().eval(), data, config).model
    return model, quantized_program(model, data[0], batches=data if rounded else None)


def shares(network: RuntimeNetwork, program: QuantizedProgram) -> tuple[float, float]:
    """Return the share of outputs equal to the last bit, and the largest difference in steps of the output's grid."""
    last = list(roundings(program.graph.graph))[-1]
    pairs = [(network(x), program.graph(x)) for x in batches()]
    outputs, expected = (torch.cat(each) for each in zip(*pairs, strict=True))
    equal = float((outputs == expected).double().mean())
    return equal, float((outputs - expected).abs().max() / last.grid.scale)


@pytest.mark.parametrize("preset", ["w8a8", "w4a4"])
def test_executorch_computes_every_layer_in_integers_as_simulated(preset: str, tmp_path: Path) -> None:
    _, program = program_of(preset)
    summary = export_executorch(program, None, tmp_path / "model.pte")
    assert (summary.integer_layers, summary.layers, summary.float_layers) == (5, 5, ())
    equal, steps = shares(ExecuTorchNetwork(summary.path), program)
    assert equal > 0.95 and steps < 1.01


@pytest.mark.parametrize(("preset", "network"), [("w8a8", Network), ("w8a8", Chain), ("w4a4", Chain)])
@pytest.mark.parametrize("delegate", [True, False])
def test_litert_computes_every_layer_in_integers_as_simulated(
    preset: str, network: type[nn.Module], delegate: bool, tmp_path: Path
) -> None:
    _, program = program_of(preset, network=network)
    summary = export_litert(program, None, tmp_path / "model.tflite")
    assert (summary.integer_layers, summary.layers, summary.float_layers) == (5, 5, ())
    assert summary.integer_inputs and summary.integer_outputs
    equal, steps = shares(LiteRTNetwork(summary.path, threads=1, delegate=delegate), program)
    assert equal > 0.9 and steps < 1.01


def test_litert_refuses_a_pooled_tensor_on_two_grids_of_few_bits(tmp_path: Path) -> None:
    _, program = program_of("w4a4")
    with pytest.raises(ExportError, match="LiteRT's converter cannot take the network"):
        export_litert(program, None, tmp_path / "model.tflite")
    assert list(tmp_path.iterdir()) == []


def test_executorch_computes_in_float_what_nothing_rounds_and_says_so(tmp_path: Path) -> None:
    model, program = program_of("w8a8", rounded=False)
    summary = export_executorch(program, None, tmp_path / "model.pte")
    assert summary.float_layers == program.float_outputs and "last" in summary.float_layers
    assert summary.integer_layers == 5 - len(program.float_outputs) >= 1
    assert "floating point" in summary.notes[0] and "last" in summary.notes[0]
    network = ExecuTorchNetwork(summary.path)
    for x in batches():
        assert (network(x) - program.graph(x)).abs().max() < 0.02 * model(x).abs().max()


def test_litert_says_which_grids_its_converter_left_out(tmp_path: Path) -> None:
    _, program = program_of("w8a8", rounded=False)
    summary = export_litert(program, None, tmp_path / "model.tflite")
    file = LiteRTFile(summary.path.read_bytes())
    lost = {
        (float(torch.tensor(rounding.grid.scale)), rounding.grid.zero_point)
        for rounding in roundings(program.graph.graph)
    } - file.grids
    assert lost and f"left out {len(lost)} of" in summary.notes[-1]


def test_the_grids_and_codes_of_the_file_are_those_of_the_program(tmp_path: Path) -> None:
    _, program = program_of("w8a8")
    summary = export_litert(program, None, tmp_path / "model.tflite")
    file = LiteRTFile(summary.path.read_bytes())
    assert all(layer.types == ("INT8",) * 3 for layer in file.layers) and len(file.layers) == 5
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(summary.path))
    interpreter.allocate_tensors()
    stored = []
    for place in interpreter.get_tensor_details():
        if len(place["quantization_parameters"]["scales"]) == 8 and len(place["shape"]) == 4:
            try:
                stored.append(torch.from_numpy(interpreter.get_tensor(place["index"])))
            except ValueError:  # a tensor between layers
                continue
    codes = dict(program.graph.named_buffers())["model.third.weight_codes"].permute(0, 2, 3, 1)
    assert any(each.shape == codes.shape and torch.equal(each, codes) for each in stored)


def test_the_command_line_lowers_a_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, program = program_of("w8a8")
    program.save(tmp_path / "model.pt2")
    for name in ("model.pte", "model.tflite"):
        assert main(["lower", str(tmp_path / "model.pt2"), str(tmp_path / name)]) == 0
        assert "5 of 5 layers compute in 8-bit integers" in capsys.readouterr().out
        assert (tmp_path / name).stat().st_size > 1000


def test_another_batch_size_is_refused(tmp_path: Path) -> None:
    _, program = program_of("w8a8")
    x = torch.zeros(3, 3, 16, 16)
    for export, name, network in (
        (export_executorch, "model.pte", ExecuTorchNetwork),
        (export_litert, "model.tflite", LiteRTNetwork),
    ):
        export(program, None, tmp_path / name)
        with pytest.raises(ExportError, match="exported size"):
            network(tmp_path / name)(x)


@pytest.mark.parametrize("network", [ExecuTorchNetwork, LiteRTNetwork])
def test_a_file_of_another_kind_is_refused(network: type[RuntimeNetwork], tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"nothing of this kind")
    with pytest.raises(ExportError, match="cannot load"):
        network(tmp_path / "model")


def test_this_executorch_is_the_one_that_was_seen() -> None:
    assert importlib.metadata.version("executorch").startswith("1.3.")
