"""Where an exported file and the simulation part: layer by layer, each on what the runtime itself gave it.

A code that is rounded the other way in one layer changes all layers behind it, and nothing is wrong there. So each
layer of the simulation is run on the input that the runtime's layer had: what differs then was made in that layer.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from repapq_plugin.core.compare import relative_error
from repapq_plugin.core.hooks import Hooks
from repapq_plugin.core.running import inference
from repapq_plugin.core.tensors import first_tensor
from repapq_plugin.diagnosis.differences import LayerDifference
from repapq_plugin.errors import ExportError
from repapq_plugin.evaluation.runtimes import OnnxRuntimeNetwork, existing_file
from repapq_plugin.quantizers.layers import QuantizedLayer

if TYPE_CHECKING:
    import onnx

CODES = ".weight_codes"
"""What the name of a layer's integer weights ends in, behind the layer's path."""

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class _Place:
    """A layer in a graph: names of its input before it is rounded, and of its output."""

    layer: str
    given: str
    made: str


def layer_differences(
    model: nn.Module,
    path: str | Path,
    example: Tensor,
    arithmetic: Literal["exact", "integer", "native"] = "exact",
) -> list[LayerDifference]:
    """Compare every quantized layer of an ONNX file with the simulation.

    Args:
        model: The simulation: what was exported, with the plugin's own quantizers.
        path: ``.onnx`` file that `export_onnx` wrote.
        example: One input of the network, float.
        arithmetic: How onnxruntime computes; see `OnnxRuntimeNetwork`.

    Returns:
        One entry for each call of a layer, in the order of the file.

    Raises:
        ExportError: The file cannot be run, or it has no layer of this network.
    """
    places, values = _run_file(Path(path), example, arithmetic)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    places = [place for place in places if place.layer in layers]
    if not places:
        raise ExportError(
            f"{path} has no layer of this network with integer weights; compare the result that it was exported from."
        )
    simulated = _inputs_of(model, {place.layer: layers[place.layer] for place in places}, example)
    calls: Counter[str] = Counter()
    found = []
    with inference(model):
        for place in places:
            call = calls[place.layer]
            calls[place.layer] += 1
            given = values[place.given].to(example.device)
            wanted = layers[place.layer](given)
            inputs = simulated[place.layer]
            arriving = relative_error([given], [inputs[call]]) if call < len(inputs) else float("nan")
            own = relative_error([values[place.made].to(example.device).reshape(wanted.shape)], [wanted])
            found.append(LayerDifference(place.layer, call, own, arriving))
    return found


def _run_file(
    path: Path, example: Tensor, arithmetic: Literal["exact", "integer", "native"]
) -> tuple[list[_Place], dict[str, Tensor]]:
    """Run a file with every layer's input and output handed out as well."""
    try:
        import onnx
    except ImportError as error:
        raise ExportError("This needs the package onnx: pip install 'repapq-plugin[export]'") from error
    try:
        graph = onnx.load(existing_file(path))
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"{path} is no ONNX file: {error}.") from error
    places = list(_places(graph.graph))
    outputs = [value.name for value in graph.graph.output]
    wanted = dict.fromkeys(name for place in places for name in (place.given, place.made))
    inputs = {value.name for value in graph.graph.input}
    more = [name for name in wanted if name not in outputs and name not in inputs]
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in more)
    with tempfile.TemporaryDirectory() as folder:
        opened = Path(folder) / "watched.onnx"
        onnx.save(graph, opened)
        network = OnnxRuntimeNetwork(opened, arithmetic=arithmetic)
        arrays = network.run_arrays([example.detach().cpu().numpy()])
    values = {name: torch.from_numpy(array) for name, array in zip((*outputs, *more), arrays, strict=True)}
    return places, {**values, **dict.fromkeys(inputs, example.detach().cpu())}


def _places(graph: onnx.GraphProto) -> Iterator[_Place]:
    """Yield the layers with integer weights, in the graph's order."""
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    known = {initializer.name for initializer in graph.initializer}
    for node in graph.node:
        if node.op_type not in PRODUCTS:
            continue
        codes = _behind(node.input[1], makers, ("DequantizeLinear", "Transpose", "Reshape"))
        if not codes.endswith(CODES):
            continue
        layer, made = codes.removesuffix(CODES), node.output[0]
        # A matrix product has its bias behind it.
        added = [each for each in readers.get(made, []) if each.op_type == "Add" and known & {*each.input}]
        if node.op_type == "MatMul" and len(added) == 1:
            made = added[0].output[0]
        yield _Place(layer, _behind(node.input[0], makers, ("DequantizeLinear", "QuantizeLinear", "Clip")), made)


def _behind(name: str, makers: Mapping[str, onnx.NodeProto], kinds: tuple[str, ...]) -> str:
    """Return what a tensor was made of, before some kinds of nodes, each passed at most once in this order."""
    for kind in kinds:
        if name in makers and makers[name].op_type == kind:
            name = makers[name].input[0]
    return name


def _inputs_of(model: nn.Module, layers: Mapping[str, nn.Module], example: Tensor) -> dict[str, list[Tensor]]:
    """Return what each call of layers is given in the simulation."""
    given: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            x = first_tensor(args, kwargs)
            if x is not None:
                given[name].append(x.detach().clone())

        return hook

    with inference(model), Hooks() as hooks:
        for name, layer in layers.items():
            hooks.before(layer, keep(name), with_kwargs=True)
        model(example)
    return given
