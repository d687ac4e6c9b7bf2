"""One ONNX graph out of two: what the first returns is what the second takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repapq_plugin.export.blame import explained

if TYPE_CHECKING:
    import onnx


def joined(network: onnx.ModelProto, tail: onnx.ModelProto, prefix: str) -> onnx.ModelProto:
    """Return a model that computes ``tail(network(x))`` for a batch of one.

    Args:
        network: Its outputs are, in order, the inputs of ``tail``. Its properties stay.
        tail: Written for a batch of one, of the same operator set.
        prefix: What is put before the names of its nodes and values, its outputs' aside.

    Raises:
        ExportError: They do not fit together.
    """
    import onnx
    import onnx.compose

    outputs = [value.name for value in tail.graph.output]
    first, second = onnx.ModelProto(), onnx.ModelProto()
    first.CopyFrom(network)
    second.CopyFrom(tail)
    del second.metadata_props[:]
    # Both come from one exporter; of the two it may have needed a newer form of file for one.
    first.ir_version = second.ir_version = max(first.ir_version, second.ir_version)
    for value in (*first.graph.input, *first.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    with explained("The network and what follows it cannot be joined to one graph"):
        second = onnx.compose.add_prefix(second, prefix)
        sources = [value.name for value in first.graph.output]
        sinks = [value.name for value in second.graph.input]
        whole = onnx.compose.merge_models(first, second, list(zip(sources, sinks, strict=True)))
        del whole.graph.value_info[:]
        for name, value in zip(outputs, whole.graph.output, strict=True):
            for node in whole.graph.node:
                node.output[:] = [name if output == value.name else output for output in node.output]
                node.input[:] = [name if given == value.name else given for given in node.input]
            value.name = name
        onnx.checker.check_model(whole, full_check=True)
    return whole
