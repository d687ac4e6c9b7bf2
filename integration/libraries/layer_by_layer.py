"""A file held against the simulation layer by layer, each layer on what it really read in the runtime.

Two implementations round a sum differently in its last bit. Where an activation lies that near to a boundary of its
grid it moves by a whole step, and the layers behind it spread that: in a deep network with random weights, outputs say
little. Here nothing spreads. The runtime's tensors in front of and behind every integer layer are read; the simulation
runs with each layer answering what it gave in the runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from repapq_plugin.core.hooks import other_forwards
from repapq_plugin.core.onnx_weights import integer_layers
from repapq_plugin.core.tensors import first_tensor
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize
from repapq_plugin.quantizers.layers import QuantizedLayer, bias_of

TIE = 1e-3
"""How near to a boundary of its grid, in steps, a value may be rounded to either side."""


@dataclass(frozen=True)
class Call:
    """One call of an integer layer in the runtime.

    Args:
        read: What is quantized for it; behind the clamp of a grid of few bits, where there is one.
        rounded: That, quantized and dequantized.
        gave: What the layer made of it.
        operator: What it is in the graph.
    """

    read: Tensor
    rounded: Tensor
    gave: Tensor
    operator: str


class FirstOfEqual(TorchFunctionMode):
    """Lets ``topk`` take the first of equal values first, as ONNX does; torch leaves the order open."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if getattr(func, "__name__", "") == "topk":
            return in_order(*args, **(kwargs or {}))  # type: ignore[arg-type]
        return func(*args, **(kwargs or {}))


def in_order(input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:
    """Return what ``torch.topk`` returns, equal values in the order of their places."""
    values, places = input.sort(dim=dim, descending=largest, stable=True)
    return torch.return_types.topk((values.narrow(dim, 0, k), places.narrow(dim, 0, k)))


@dataclass
class Comparison:
    """How far the simulation is from the runtime, relative to the largest value of each tensor.

    Args:
        calls: Calls of layers that were compared.
        between: What layers read, and what the network returns, from what layers gave.
        layers: What layers give on what they read.
        moved: Values that were rounded to another code.
        far: Those of them that lie on no boundary, or moved by more than a step.
    """

    calls: int = 0
    between: float = 0.0
    layers: float = 0.0
    moved: int = 0
    far: int = 0


def run_in_runtime(path: Path, images: Tensor) -> tuple[list[Call], list[Tensor]]:
    """Run a file node by node, as it was written; return the calls of integer layers in order, and the outputs."""
    model = onnx.load(path)
    graph = model.graph
    made_by = {name: node for node in graph.node for name in node.output}
    names: list[str] = []
    nodes = integer_layers(graph)
    for node in nodes:
        dequantize = made_by[node.input[0]]
        while dequantize.op_type != "DequantizeLinear":  # a layer that pads by itself
            dequantize = made_by[dequantize.input[0]]
        quantize = made_by[dequantize.input[0]]
        while quantize.op_type != "QuantizeLinear":  # codes are padded
            quantize = made_by[quantize.input[0]]
        names += [quantize.input[0], dequantize.output[0], node.output[0]]
    own = [value.name for value in graph.output]
    present = {value.name for value in (*graph.input, *graph.output)}
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in present)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    wanted = [value.name for value in session.get_outputs()]
    arrays = session.run(wanted, {given.name: images.numpy()})
    values = {given.name: images} | {name: torch.from_numpy(array) for name, array in zip(wanted, arrays, strict=True)}
    triples = zip(names[::3], names[1::3], names[2::3], nodes, strict=True)
    calls = [Call(values[read], values[rounded], values[gave], node.op_type) for read, rounded, gave, node in triples]
    return calls, [values[name] for name in own]


@torch.no_grad()
def compare(simulation: nn.Module, images: Tensor, path: Path, outputs: Callable[[object], list[Tensor]]) -> Comparison:
    """Run a file and the simulation that it was made from, and compare them layer by layer.

    Args:
        simulation: In evaluation mode.
        images: What to run both on.
        path: The file.
        outputs: What is compared of what either returns.
    """
    calls, results = run_in_runtime(path, images)
    left = iter(calls)
    found = Comparison()

    def answering(layer: QuantizedLayer) -> Callable[..., Tensor]:
        own = cast("Callable[..., Tensor]", layer.forward)

        def forward(*args: object, **kwargs: object) -> Tensor:
            call = next(left)
            x = first_tensor(args, kwargs)
            assert x is not None
            quantizer = layer.input_fake_quant
            found.calls += 1
            found.between = max(found.between, apart(within(quantizer, call.read), within(quantizer, x)))
            _compare_rounding(found, quantizer, call)
            gave = call.gave
            bias = bias_of(layer)
            if call.operator == "MatMul" and bias is not None:  # the bias is an addition behind it
                gave = gave + bias
            found.layers = max(found.layers, apart(own(call.rounded), gave))
            return gave

        return forward

    layers = [module for module in simulation.modules() if isinstance(module, QuantizedLayer)]
    with other_forwards({layer: answering(layer) for layer in layers}), FirstOfEqual():
        wanted = outputs(simulation(images.clone()))
    assert next(left, None) is None and found.calls == len(calls)
    for result, tensor in zip(outputs(results), wanted, strict=True):
        found.between = max(found.between, apart(result, tensor))
    return found


def _compare_rounding(found: Comparison, quantizer: LearnableFakeQuantize, call: Call) -> None:
    rounded = quantizer(call.read)
    moved = (rounded - call.rounded).abs() > 0.5 * quantizer.scale
    steps = call.read / quantizer.scale
    on_boundary = ((steps - steps.floor()) - 0.5).abs() < TIE
    by_one = (rounded - call.rounded).abs() < 1.5 * quantizer.scale
    found.moved += int(moved.sum())
    found.far += int((moved & ~(on_boundary & by_one)).sum())


def within(quantizer: LearnableFakeQuantize, x: Tensor) -> Tensor:
    """Clamp to what a quantizer's grid holds, as the runtime's tensor may be already."""
    scale, zero_point = quantizer.scale, quantizer.zero_point
    low, high = ((bound - zero_point) * scale for bound in (quantizer.quant_min, quantizer.quant_max))
    return torch.maximum(torch.minimum(x, high), low)


def apart(one: Tensor, other: Tensor) -> float:
    """Return the largest difference relative to the largest value; infinite for tensors of different shape."""
    if one.shape != other.shape:
        return float("inf")
    peak = float(other.abs().max()) if other.numel() else 0.0
    return float((one - other).abs().max()) / peak if peak else float(bool(one.any()))
