"""Names of an ONNX graph's inputs and outputs, and which of their axes are open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from repapq_plugin.errors import ExportError

Axes = Mapping[int, str]
"""Open axes of a tensor by number; each name stands for one length."""

BATCH = "batch"
"""Name of the length of the batch."""


class GraphNames:
    """Names of the graph's inputs and outputs, and which of their axes are open.

    Args:
        inputs: The tensors that the model is called with.
        outputs: The tensors that it returns.
        input_names: A name for each input; ``None`` calls them ``input``, or ``input_0``, ``input_1``...
        output_names: The same for outputs.

    Raises:
        ExportError: There are more or fewer names than tensors, or a name comes twice.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        input_names: Sequence[str] | None,
        output_names: Sequence[str] | None,
    ) -> None:
        self.inputs = _chosen("input", inputs, input_names)
        self.outputs = _chosen("output", outputs, output_names)
        both = {*self.inputs} & {*self.outputs}
        if both:
            raise ExportError(f"{sorted(both)} are names of inputs and of outputs; give each tensor a name of its own.")

    def open_axes(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], more: Sequence[Sequence[Tensor]]
    ) -> dict[str, Axes]:
        """Return the axes whose length changed between two runs, by name of their tensor.

        Args:
            inputs: What the model was called with.
            outputs: What it returned.
            more: The same of a run with another batch size: its inputs and its outputs.
        """
        batches = next((a.shape[0], b.shape[0]) for a, b in zip(inputs, more[0], strict=True) if a.shape != b.shape)
        axes: dict[str, Axes] = {}
        named = zip((*self.inputs, *self.outputs), (*inputs, *outputs), (*more[0], *more[1]), strict=True)
        for name, one, other in named:
            lengths = list(enumerate(zip(one.shape, other.shape, strict=True)))
            changed = {i: BATCH if both == batches else f"{name}_{i}" for i, both in lengths if both[0] != both[1]}
            if changed:
                axes[name] = changed
        return axes


def _chosen(kind: str, tensors: Sequence[Tensor], names: Sequence[str] | None) -> list[str]:
    if names is None:
        return [kind] if len(tensors) == 1 else [f"{kind}_{i}" for i in range(len(tensors))]
    if len(names) != len(tensors) or len(set(names)) != len(names):
        raise ExportError(
            f"{kind}_names={list(names)} must be {len(tensors)} different names, one for each {kind} of the model."
        )
    return list(names)
