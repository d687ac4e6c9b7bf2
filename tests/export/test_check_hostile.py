"""An ONNX file that somebody broke: it is judged, or an error says that it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repapq_plugin.errors import ExportError
from repapq_plugin.export.check import check_onnx
from repapq_plugin.targets import TARGETS
from tests.support.checked_graphs import Clean

Draw = Callable[[st.SearchStrategy[int]], int]


def honest() -> onnx.ModelProto:
    return Clean("uint8", per_channel=True).model


def broken(model: onnx.ModelProto, draw: Draw) -> None:
    """Break one thing of a graph."""
    graph, whole = model.graph, st.integers(0, 10**6)

    def one(values: object) -> object:
        listed = list(values)  # type: ignore[call-overload]
        return listed[draw(whole) % len(listed)]

    node, tensor = one(graph.node), one(graph.initializer)
    match draw(st.integers(0, 10)):
        case 0 if node.input:
            node.input[draw(whole) % len(node.input)] = one(["", "nowhere", "x", tensor.name])
        case 1 if node.input:
            del node.input[draw(whole) % len(node.input) :]
        case 2:
            del node.output[:]
        case 3:
            node.op_type = one(["", "Conv", "Gemm", "QuantizeLinear", "DequantizeLinear", "Clip", "Loop", "Pad"])
        case 4:
            del node.attribute[:]
        case 5:
            tensor.data_type = one([0, 1, 2, 3, 7, 8, 9, 16, 17, 22, 99])
        case 6:
            tensor.raw_data = tensor.raw_data[: draw(whole) % (len(tensor.raw_data) + 1)]
        case 7:
            del tensor.dims[:]
            tensor.dims.extend([one([-1, 0, 1, 7, 2**40]) for _ in range(draw(st.integers(0, 4)))])
        case 8:
            del model.opset_import[:]
        case 9:
            del graph.input[:]
        case _:
            tensor.name = one(["", "x", "x"])


@given(data=st.data())
def test_a_broken_graph_is_judged_or_refused(data: st.DataObject) -> None:
    model = honest()
    for _ in range(data.draw(st.integers(1, 3))):
        broken(model, data.draw)
    try:
        assert all(str(finding) for finding in check_onnx(model, data.draw(st.sampled_from(sorted(TARGETS)))))
    except ExportError as error:
        assert str(error).startswith("The graph is no valid ONNX: it cannot be judged (")


@given(data=st.data())
def test_a_file_of_which_bytes_changed_is_judged_or_refused(data: st.DataObject, tmp_path_factory) -> None:
    content = bytearray(honest().SerializeToString())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=20)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "changed.onnx"
    path.write_bytes(content)
    try:
        check_onnx(path, "tensorrt")
    except ExportError:
        return


@pytest.mark.parametrize("place", ["../../../../etc/passwd", "/etc/passwd", "nowhere"])
def test_a_file_reads_no_weights_from_elsewhere(place: str, tmp_path: Path) -> None:
    model = honest()
    tensor = model.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="model.onnx cannot be read as ONNX"):
        check_onnx(tmp_path / "model.onnx", "tensorrt")
