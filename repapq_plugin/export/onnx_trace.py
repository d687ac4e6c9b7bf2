"""From a deployed model to a traced ONNX graph, and what one run of the model says that the graph must hold."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from repapq_plugin.core.hooks import Hooks
from repapq_plugin.core.running import frozen, is_out_of_memory
from repapq_plugin.core.tensors import first_tensor, floating_tensors, tensors_of, version_of
from repapq_plugin.errors import ExportError
from repapq_plugin.export.blame import Running, explained, layer_with_operator
from repapq_plugin.export.calls import Call
from repapq_plugin.export.deploy import DeployedLayer, DeployedSkip
from repapq_plugin.export.onnx_names import Axes, GraphNames
from repapq_plugin.reparam.norms import is_norm

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Expected:
    """What one forward of the deployed model did: the graph must do the same.

    Args:
        outputs: The tensors that it returned, in order.
        layer_calls: Calls of layers with integer weights.
        input_pairs: Different pairs of a tensor that was read and the grid on which it was read.
        clamps: Those of them whose grid has fewer than 8 bits.
        norms: Calls of normalization layers.
        other_reads: How often something else than their layers has read integer weights.
        weights: Integer weights by path of their layer, int8.
    """

    outputs: list[Tensor]
    layer_calls: int
    input_pairs: int
    clamps: int
    norms: int
    other_reads: int
    weights: dict[str, Tensor]

    def differs_from(self, other: Expected) -> bool:
        """Whether another run on the same example gave other outputs."""
        pairs = zip(self.outputs, other.outputs, strict=False)
        return len(self.outputs) != len(other.outputs) or not all(torch.equal(a, b) for a, b in pairs)


Reading = tuple[int, int, float, int, tuple[float, float] | None]
"""A tensor (its ``id`` and version) and the grid on which a layer reads it (scale, zero point, clamp range)."""


@torch.no_grad()
def run_once(deployed: nn.Module, call: Call) -> Expected:
    """Run the deployed model once and note what its layers read.

    Raises:
        ExportError: It cannot run, or returns no tensor.
    """
    read: list[tuple[Tensor, Reading]] = []  # the tensors are kept, so that an id stays theirs
    calls = norms = 0
    layers = {name: m for name, m in deployed.named_modules() if isinstance(m, DeployedLayer)}
    skips = [module for module in deployed.modules() if isinstance(module, DeployedSkip)]

    def note(layer: nn.Module, inputs: tuple[object, ...], kwargs: dict[str, object]) -> None:
        nonlocal calls
        layer = cast(DeployedLayer, layer)
        calls += layer.quantizes_weight
        if layer.quantizes_input:
            note_reading(layer, (cast(Tensor, first_tensor(inputs, kwargs)),))

    def note_reading(reader: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x, reader = inputs[0], cast("DeployedLayer | DeployedSkip", reader)
        grid = (float(reader.input_scale), int(reader.input_zero_point), reader.clamp_range)
        read.append((x, (id(x), version_of(x), *grid)))

    def note_norm(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal norms
        norms += 1

    with Hooks() as hooks:
        for layer in layers.values():
            hooks.before(layer, note, with_kwargs=True)
        for skip in skips:
            hooks.before(skip, note_reading)
        for module in deployed.modules():
            if is_norm(module):
                hooks.before(module, note_norm)
        with (
            Running(deployed) as running,
            explained("The model cannot run on the example", where=lambda _: running.path),
        ):
            before = sum(layer.weight_reads for layer in layers.values())
            outputs = tensors_of(call.run(deployed))
            other_reads = sum(layer.weight_reads for layer in layers.values()) - before
    if not outputs:
        raise ExportError("The model returns no tensor, so there is nothing to export; let forward return its result.")
    readings = {reading for _, reading in read}
    return Expected(
        outputs=[x.detach() for x in outputs],
        layer_calls=calls,
        input_pairs=len(readings),
        clamps=sum(clamp_range is not None for *_, clamp_range in readings),
        norms=norms,
        other_reads=other_reads,
        weights={name: layer.weight_codes for name, layer in layers.items() if layer.quantizes_weight},
    )


def unread_calls(plain: nn.Module, call: Call, names: Collection[str]) -> Counter[str]:
    """Return how many calls of layers nothing depends on that the model returns: the exporter leaves them out.

    Args:
        plain: The model in float, without quantizers.
        call: What to run it on.
        names: Module paths of the layers.

    Returns:
        Numbers of such calls by module path. Where gradients cannot tell, as with outputs that are whole numbers or a
        model that runs without gradients only, there may be more of them.
    """
    probes: list[tuple[str, Tensor]] = []

    def mark(name: str) -> Callable[..., object]:
        def hook(_: nn.Module, args: object, output: object) -> object:
            if not isinstance(output, Tensor):
                return None
            probe = output.new_zeros((), requires_grad=True)
            probes.append((name, probe))
            return output + probe

        return hook

    with Hooks() as hooks, frozen(plain), torch.enable_grad():
        for name in names:
            hooks.after(plain.get_submodule(name), mark(name))
        try:
            outputs = [tensor for tensor in floating_tensors(call.run(plain)) if tensor.requires_grad]
            total = sum((tensor.sum() for tensor in outputs), start=torch.zeros(()))
            gradients = torch.autograd.grad(total, [probe for _, probe in probes], allow_unused=True)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            return Counter(name for name, _ in probes)
    return Counter(name for (name, _), gradient in zip(probes, gradients, strict=True) if gradient is None)


def trace(module: nn.Module, call: Call, names: GraphNames, axes: Mapping[str, Axes], opset: int) -> onnx.ModelProto:
    """Return the ONNX model of ``module``, its inputs and outputs in the order of `tensors_of`.

    Args:
        module: In evaluation mode.
        call: What to trace it on.
        names: Names of inputs and outputs.
        axes: Their open axes by name.
        opset: ONNX operator set.

    Raises:
        ExportError: The exporter cannot follow the module's forward.
    """
    import onnx

    buffer = io.BytesIO()
    with call.flattened(module) as inputs, Running(module) as running:

        def where(error: Exception) -> str:
            return running.path or layer_with_operator(str(error), module, inputs)

        failure = f"The model cannot be traced to ONNX opset {opset}"
        with explained(failure, "Export the part of the model that maps tensors to tensors.", where):
            # The tracing exporter: it follows any Python that runs, where the newer one needs a program
            # without data-dependent control flow. It warns about its age and about every traced shape.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    module,
                    inputs,
                    buffer,  # type: ignore[arg-type]
                    dynamo=False,
                    opset_version=opset,
                    input_names=names.inputs,
                    output_names=names.outputs,
                    dynamic_axes=axes,
                )
            return onnx.load_from_string(buffer.getvalue())
