"""Whatever stops an export is an `ExportError` that names the layer and says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from repapq_plugin.errors import ConfigError, ExportError
from repapq_plugin.export import export_onnx, export_openvino
from repapq_plugin.export.blame import LONGEST, Running, explained, layer_in
from tests.support.export_networks import Chain, make


class Failing(nn.Module):
    """Fails in its forward, at inference or only while it is traced."""

    def __init__(self, error: BaseException, only_traced: bool = False) -> None:
        super().__init__()
        self.error, self.only_traced = error, only_traced

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing() or not self.only_traced:
            raise self.error
        return x


class Unsupported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class Inside(nn.Module):
    """Holds a module two levels down, behind a convolution."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"head": nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(module))})

    def forward(self, x: Tensor) -> Tensor:
        return self.body["head"](x)


X = torch.ones(1, 3, 4, 4)


@pytest.mark.parametrize("write", [export_onnx, export_openvino])
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Failing(KeyError("it")), r"cannot run on the example, in 'body\.head\.1\.0': KeyError: 'it'"),
        (
            Failing(RuntimeError("no"), True),
            r"cannot be traced to ONNX opset 17, in 'body\.head\.1\.0': RuntimeError: no",
        ),
        (Unsupported(), r"cannot be traced .*, in 'body\.head\.1\.0': .*bessel_j0.*Export the part of the model"),
    ],
)
def test_a_failing_layer_is_named(
    write: Callable[..., object], module: nn.Module, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        write(Inside(module), X, tmp_path / "model.xml")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), MemoryError(), torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: no")]
)
@pytest.mark.parametrize("only_traced", [False, True])
def test_interruption_and_full_memory_pass(error: BaseException, only_traced: bool, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        export_onnx(Inside(Failing(error, only_traced)), X, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def damaged(change: Callable[[onnx.GraphProto], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every tidied graph be changed afterwards."""
    from repapq_plugin.export import qdq_onnx

    tidy = qdq_onnx.tidy

    def tidy_and_change(graph: onnx.GraphProto) -> None:
        tidy(graph)
        change(graph)

    monkeypatch.setattr(qdq_onnx, "tidy", tidy_and_change)


def test_a_graph_that_is_not_valid_is_said_with_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_kernel(graph: onnx.GraphProto) -> None:
        conv = next(node for node in graph.node if node.name == "/second/Conv")
        next(a for a in conv.attribute if a.name == "strides").ints[:] = [1, 1, 1]

    model, x = make(Chain, 8, 8)
    damaged(wrong_kernel, monkeypatch)
    with pytest.raises(ExportError, match=r"not valid ONNX, in 'second': .*Export with another opset"):
        export_onnx(model, x, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_onnxruntime_refuses_is_said_with_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown_operator(graph: onnx.GraphProto) -> None:
        next(node for node in graph.node if node.name == "/head/head.0/Conv").op_type = "Convolve"

    damaged(unknown_operator, monkeypatch)
    with pytest.raises(ExportError, match=r"onnxruntime cannot run the graph.*: .*Convolve.*another opset"):
        export_onnx(Inside(nn.ReLU()), X, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_fails_in_onnxruntime_while_it_runs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        def get_inputs(self) -> list[object]:
            return []

        def run(self, *args: object) -> object:
            raise ValueError("Node: /head/head.0/Conv failed")

    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *args, **kwargs: Session())
    with pytest.raises(ExportError, match=r"onnxruntime cannot run the graph, in 'body\.head\.0': ValueError"):
        export_onnx(Inside(nn.ReLU()), X, tmp_path / "model.onnx")


def test_what_openvino_refuses_is_said_with_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    class Core(openvino.Core):
        def compile_model(self, *args: object, **kwargs: object) -> object:
            raise RuntimeError("While validating node with friendly_name '/third/Conv'")

    monkeypatch.setattr(openvino, "Core", Core)
    model, x = make(Chain, 8, 8)
    with pytest.raises(ExportError, match=r"OpenVINO cannot convert model\.onnx.*, in 'third': .*Export only the part"):
        export_openvino(model, x, tmp_path / "model.xml")
    assert list(tmp_path.iterdir()) == []


def test_a_network_without_tensors_to_return_is_an_error(tmp_path: Path) -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "nothing"

    with pytest.raises(ExportError, match="returns no tensor"):
        export_onnx(Nothing(), X, tmp_path / "model.onnx")


def test_node_names_lead_to_modules() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.neck = nn.ModuleList([nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1)), nn.ReLU())])
            self.branches = nn.ModuleList(
                [nn.ModuleDict({"box": nn.Sequential(nn.ReLU()), str(i): nn.ReLU()}) for i in range(2)]
            )
            self.heads = nn.ModuleDict({"score": nn.Sequential(nn.ReLU())})
            self.last = nn.Conv2d(3, 3, 1)

    net = Net()
    for text, path in (
        ("node (/neck.0/neck.0.0/neck.0.0.0/Conv) is wrong", "neck.0.0.0"),
        ("/neck.0/neck.0.1/Relu_output_0", "neck.0.1"),
        ("Error at /src/runtime/session.cc:12, '/last/Conv_3'", "last"),
        ("/score/score.0/Relu", "heads.score.0"),
        ("/box/box.0/Relu", ""),  # of either branch
        ("/branches.1/box/box.0/Relu", "branches.1.box.0"),
        ("/Reshape is wrong", ""),
        ("no node at all", ""),
    ):
        assert layer_in(text, net) == path


def test_running_knows_where_an_error_came_up_and_leaves_no_hooks() -> None:
    class Catches(Inside):
        def forward(self, x: Tensor) -> Tensor:
            try:
                return super().forward(x)
            except KeyError:
                return x

    net = Inside(Failing(KeyError("it")))
    with pytest.raises(KeyError), Running(net) as running:
        net(X)
    assert running.path == "body.head.1.0"
    outer = nn.Sequential(Catches(Failing(KeyError("it"))), Failing(ValueError("later")))
    with pytest.raises(ValueError, match="later"), Running(outer) as running:
        outer(X)
    assert running.path == "1"
    for module in (*net.modules(), *outer.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_errors_of_the_package_stay_and_long_texts_are_cut() -> None:
    with pytest.raises(ConfigError, match="^known$"), explained("It fails"):
        raise ConfigError("known")
    with pytest.raises(ExportError) as seen, explained("It fails", "Do something else."):
        raise ValueError("x" * 1000 + "\n\nmore")
    assert str(seen.value) == f"It fails: ValueError: {'x' * LONGEST}. Do something else."
    assert isinstance(seen.value.__cause__, ValueError)
