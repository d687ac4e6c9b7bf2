"""What networks take and return, their dtypes, and what their layers keep in an export."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import onnx
import pytest
import torch
from torch import Tensor, nn

from repapq_plugin.core.tensors import tensors_of
from repapq_plugin.errors import ExportError
from repapq_plugin.evaluation.runtimes import OnnxRuntimeNetwork
from repapq_plugin.export import deployable, export_onnx, export_openvino
from repapq_plugin.export.calls import Call
from tests.support.export_networks import Chain, make, quantized, set_ranges


@dataclass(frozen=True)
class Boxes:
    scores: Tensor
    corners: Tensor


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = quantized(nn.Conv2d(3, 4, 3, padding=1), 7, 8)


class Returns(Body):
    """Returns its tensors ``y``, ``2y``, ``3y`` in some container."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> object:
        y = self.conv(x)
        one, two, three = y, 2 * y, 3 * y
        return {
            "dataclass": lambda: Boxes(one, Boxes(two, three)),
            "nested": lambda: [one, ({"b": two}, [three])],
            "dict": lambda: {"z": one, "a": two, "m": three},
            "named": lambda: Pair(one, Pair(two, three)),
            "with others": lambda: (one, None, "text", 3, two, three),
            "list in dict": lambda: OrderedDict(levels=[one, two], last=three),
        }[self.kind]()


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("kind", ["dataclass", "nested", "dict", "named", "with others", "list in dict"])
def test_outputs_of_any_container_come_in_their_order(kind: str, tmp_path: Path) -> None:
    model = set_ranges(Returns(kind), images())
    summary = export_onnx(model, images(), tmp_path / "model.onnx", output_names=["one", "two", "three"])
    assert [value.name for value in onnx.load(summary.path).graph.output] == ["one", "two", "three"]
    assert summary.dynamic_batch
    with torch.no_grad():
        expected = tensors_of(model(images(3)))
    for got, wanted in zip(OnnxRuntimeNetwork(summary.path, threads=1)(images(3)), expected, strict=True):
        assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    openvino = export_openvino(model, images(), tmp_path / "model.xml")
    assert openvino.max_rel_difference is not None
    assert openvino.max_rel_difference < 1e-5


def test_one_tensor_twice_and_inputs_that_are_returned_or_not_read(tmp_path: Path) -> None:
    class Odd(Body):
        def forward(self, x: Tensor, unread: Tensor) -> list[Tensor]:
            y = self.conv(x)
            return [y, y, x]

    args = (images(), torch.ones(2, 5))
    summary = export_onnx(set_ranges(Odd(), *args), args, tmp_path / "model.onnx")
    graph = onnx.load(summary.path).graph
    assert [value.name for value in graph.output] == ["output_0", "output_1", "output_2"]
    assert summary.max_rel_difference is not None
    assert summary.max_rel_difference < 1e-5


class Takes(Body):
    """Takes a tensor by position, and others that change the result each in its way."""

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        *,
        shift: Tensor | None = None,
        more: object = None,
        twice: bool = False,
    ) -> Tensor:
        y = self.conv(x)
        if scale is not None:
            y = y * scale
        if shift is not None:
            y = y + shift
        for i, tensor in enumerate(tensors_of(more)):
            y = y + tensor * 10**i
        return 2 * y if twice else y


A, B = torch.full((2, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1), 0.5)


@pytest.mark.parametrize(
    ("example", "names"),
    [
        ((images(), {"shift": A}), ["x", "shift"]),
        ((images(), {"shift": A, "scale": B}), ["x", "shift", "scale"]),  # not in the order of the signature
        ({"x": images(), "scale": A}, ["x", "scale"]),
        ((images(), A, {"twice": True}), ["x", "scale"]),
        ((images(), {"more": {"b": A, "a": [B, (A,)]}}), ["x", "b", "a0", "a1"]),
        ((images(), {"more": Boxes(A, B)}), ["x", "scores", "corners"]),
        ((images(), {"more": Pair(A, B), "shift": B}), ["x", "first", "second", "shift"]),
        ((images(), {}), ["x"]),
    ],
)
def test_keywords_and_containers_are_inputs_in_their_order(example: object, names: list[str], tmp_path: Path) -> None:
    model = Takes()
    call = Call.of(example, model)
    set_ranges(model, *call.args, **call.kwargs)
    summary = export_onnx(model, example, tmp_path / "model.onnx", input_names=names)
    assert [value.name for value in onnx.load(summary.path).graph.input] == names
    assert summary.dynamic_batch
    other = call.with_inputs([torch.rand_like(x) for x in call.tensors])
    with torch.no_grad():
        expected = other.run(model)
    got = OnnxRuntimeNetwork(summary.path, threads=1)(*other.tensors)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    openvino = export_openvino(model, example, tmp_path / "model.xml")
    assert openvino.max_rel_difference is not None
    assert openvino.max_rel_difference < 1e-5


def test_a_dict_that_is_meant_by_position(tmp_path: Path) -> None:
    class Batch(Body):
        def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
            return self.conv(batch["image"]) * batch["scale"]

    batch = {"image": images(), "scale": A}
    model = set_ranges(Batch(), batch)
    for example in (batch, (batch,), (batch, {})):
        summary = export_onnx(model, example, tmp_path / "model.onnx", input_names=["image", "scale"])
        assert summary.max_rel_difference is not None
        assert summary.max_rel_difference < 1e-5


def test_tensors_that_cannot_be_reached_are_an_error(tmp_path: Path) -> None:
    class Sample:
        def items(self) -> list[tuple[str, Tensor]]:
            return [("image", images().half())]

    class Takes(Body):
        def forward(self, sample: Sample) -> Tensor:
            return self.conv(sample.items()[0][1].float())

    with pytest.raises(ExportError, match=r"cannot be taken apart \(Sample\); give tensors"):
        export_onnx(set_ranges(Takes(), Sample()), Sample(), tmp_path / "model.onnx")


def test_names_of_inputs_are_not_those_of_outputs(tmp_path: Path) -> None:
    model, x = make(Chain, 8, 8)
    with pytest.raises(ExportError, match=r"\['x'\] are names of inputs and of outputs"):
        export_onnx(model, x, tmp_path / "model.onnx", input_names=["x"], output_names=["x"])


def test_hooks_of_the_network_run_as_ever(tmp_path: Path) -> None:
    model = Takes()
    set_ranges(model, images(), shift=A)
    seen = []

    def halve(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, Tensor]) -> object:
        seen.append(sorted(kwargs))
        return args, {"shift": kwargs["shift"] / 2}

    model.register_forward_pre_hook(halve, with_kwargs=True)
    summary = export_onnx(model, (images(), {"shift": A}), tmp_path / "model.onnx")
    assert seen
    assert all(names == ["shift"] for names in seen)
    assert summary.max_rel_difference is not None
    assert summary.max_rel_difference < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_examples_of_another_dtype_are_cast(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = make(Chain, 7, 8)
    summary = export_onnx(model, x.to(dtype), tmp_path / "model.onnx")
    element = onnx.load(summary.path).graph.input[0].type.tensor_type.elem_type
    assert element == onnx.TensorProto.FLOAT
    assert summary.max_rel_difference is not None
    assert summary.max_rel_difference < 1e-5
    assert export_openvino(model, x.to(dtype), tmp_path / "model.xml").max_rel_difference < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_in_half_precision_are_exported_in_float32_and_stay(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = make(Chain, 7, 8)
    model.to(dtype)
    for example in (x, x.to(dtype)):
        summary = export_onnx(model, example, tmp_path / "model.onnx")
        tensors = onnx.load(summary.path).graph.initializer
        assert not {t.data_type for t in tensors} & {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
        assert summary.integer_layers == Chain.layers
        assert summary.max_rel_difference is not None
        assert summary.max_rel_difference < 1e-5
        assert export_openvino(model, example, tmp_path / "model.xml").max_rel_difference < 1e-5
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_whole_numbers_of_the_example_stay_what_they_are(tmp_path: Path) -> None:
    class Indexed(Body):
        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return self.conv(x)[:, index]

    args = (images().half(), torch.tensor([0, 2, 1]))
    model = set_ranges(Indexed(), images(), args[1])
    graph = onnx.load(export_onnx(model, args, tmp_path / "model.onnx").path).graph
    assert [v.type.tensor_type.elem_type for v in graph.input] == [onnx.TensorProto.FLOAT, onnx.TensorProto.INT64]


def test_a_shallow_copy_of_a_layer_is_exported_beside_it(tmp_path: Path) -> None:
    """Both have the same children and parameters in the same registries."""
    layer = quantized(nn.Conv2d(3, 3, 3, padding=1), 7, 8)
    model = set_ranges(nn.Sequential(layer, nn.ReLU(), copy.copy(layer)), images())
    with torch.no_grad():
        expected = model(images())
        assert torch.equal(deployable(model)(images()), expected)
        assert torch.equal(model(images()), expected)
    summary = export_onnx(model, images(), tmp_path / "model.onnx")
    assert summary.integer_layers == 2
    assert summary.max_rel_difference is not None
    assert summary.max_rel_difference < 1e-5


def test_the_export_form_keeps_class_attributes_and_hooks(tmp_path: Path) -> None:
    class Scaled(nn.Conv2d):
        """A class of the user's own, with a property and a method."""

        @property
        def area(self) -> int:
            return self.kernel_size[0] * self.kernel_size[1]

    class Parsed(nn.Module):
        """Walks a list of layers and reads where the input of each comes from, as parsers of YOLO do."""

        def __init__(self) -> None:
            super().__init__()
            layers = [nn.Conv2d(3, 4, 3, padding=1), Scaled(4, 4, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)]
            for i, (layer, source) in enumerate(zip(layers, (-1, -1, -1, [0, 2]), strict=True)):
                layer.f, layer.i = source, i
            self.model = nn.ModuleList(layers)

        def forward(self, x: Tensor) -> Tensor:
            made: list[Tensor] = []
            for layer in self.model:
                x = layer(torch.cat([made[j] for j in layer.f], 1) if isinstance(layer.f, list) else x)
                assert layer.i == len(made)
                made.append(x)
            return x * self.model[1].area

    net = Parsed()
    called = []
    net.model[3].register_forward_hook(lambda *_: called.append(1))
    for layer in net.model:
        if isinstance(layer, nn.Conv2d):
            quantized(layer, 7, 8)
    set_ranges(net, images())
    deployed = deployable(net)
    for before, after in zip(net.model, deployed.model, strict=True):
        assert (after.f, after.i) == (before.f, before.i)
    assert isinstance(deployed.model[1], Scaled)
    assert deployed.model[1].area == 1
    called.clear()
    summary = export_onnx(net, images(), tmp_path / "model.onnx")
    assert called
    assert summary.integer_layers == 3
    assert summary.max_rel_difference is not None
    assert summary.max_rel_difference < 1e-5
