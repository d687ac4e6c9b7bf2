"""Names of an ONNX graph's inputs and outputs, and which of their axes are open."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from repapq_plugin.core.tensors import tensors_of
from repapq_plugin.errors import ExportError


class GraphNames:
    """Names of the graph's inputs and outputs, and which of their axes are open.

    Args:
        args: What the model is called with; tensors in nested containers are inputs of their own.
        outputs: The tensors that it returns.
        input_names: A name for each input; ``None`` calls them ``input``, or ``input_0``, ``input_1``...
        output_names: The same for outputs.
        dynamic_batch: Leave the first axis of every input and output open.

    Raises:
        ExportError: There are more or fewer names than tensors, or a name comes twice.
    """

    def __init__(
        self,
        args: tuple[object, ...],
        outputs: list[Tensor],
        input_names: Sequence[str] | None,
        output_names: Sequence[str] | None,
        dynamic_batch: bool,
    ) -> None:
        inputs = tensors_of(args)
        self.inputs = _chosen("input", inputs, input_names)
        self.outputs = _chosen("output", outputs, output_names)
        named = zip(self.inputs + self.outputs, inputs + outputs, strict=True)
        self.dynamic_axes = {name: {0: "batch"} for name, x in named if x.dim() and dynamic_batch}


def _chosen(kind: str, tensors: list[Tensor], names: Sequence[str] | None) -> list[str]:
    if names is None:
        return [kind] if len(tensors) == 1 else [f"{kind}_{i}" for i in range(len(tensors))]
    if len(names) != len(tensors) or len(set(names)) != len(names):
        raise ExportError(
            f"{kind}_names={list(names)} must be {len(tensors)} different names, one for each {kind} of the model."
        )
    return list(names)
