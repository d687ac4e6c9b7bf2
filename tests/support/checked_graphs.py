"""A small quantized ONNX graph that keeps the rules of every target, to plant violations in."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SCALE, WEIGHT_SCALE = 0.03125, 0.0078125
"""Powers of two, so that a target which wants such is content too."""


class Clean:
    """Convolutions, a residual addition, a concatenation of equal grids, a transposed convolution, a matrix product.

    Args:
        dtype: ``"int8"`` or ``"uint8"``: the type of activations.
        per_channel: Whether weights have a scale for each output channel.
    """

    def __init__(self, dtype: str = "int8", *, per_channel: bool = True) -> None:
        self.dtype, self.per_channel = np.dtype(dtype), per_channel
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []
        a0 = self.pair("x", "a0")
        r1 = self.relu(self.conv("conv1", a0, (4, 4, 3, 3)))
        a1 = self.pair(r1, "a1")
        total = self.node("Add", "residual", [self.conv("conv2", a1, (4, 4, 3, 3)), a1])
        a2 = self.pair(self.relu(total), "a2")
        joined = self.node("Concat", "concat", [a2, a1], axis=1)
        a3 = self.pair(joined, "a3")
        c3 = self.conv("conv3", a3, (4, 8, 3, 3))
        scores = self.node("Sigmoid", "sigmoid", [c3])
        r3 = self.relu(c3)
        a4 = self.pair(r3, "a4")
        up = self.conv("up", a4, (4, 2, 2, 2), "ConvTranspose", axis=1, strides=[2, 2])
        pooled = self.node("Flatten", "flatten", [self.node("GlobalAveragePool", "pool", [r3])])
        logits = self.gemm("fc", self.pair(pooled, "a5"))
        shapes = {scores: [1, 4, 8, 8], up: [1, 2, 16, 16], logits: [1, 3]}
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])
        graph = helper.make_graph(self.nodes, "clean", [x], outputs, self.stored)
        self.model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])

    def node(self, kind: str, name: str, inputs: list[str], **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [f"{name}.out"], name=name, **attributes))
        return f"{name}.out"

    def store(self, name: str, values: object, dtype: object = np.float32) -> str:
        self.stored.append(numpy_helper.from_array(np.array(values, dtype), name))
        return name

    def pair(self, value: str, name: str) -> str:
        grid = [self.store(f"{name}.scale", SCALE), self.store(f"{name}.zero", 0, self.dtype)]
        codes = self.node("QuantizeLinear", f"{name}.q", [value, *grid])
        return self.node("DequantizeLinear", f"{name}.dq", [codes, *grid])

    def relu(self, value: str) -> str:
        return self.node("Relu", f"{value}.relu", [value])

    def weight(self, name: str, shape: tuple[int, ...], axis: int) -> str:
        codes = self.rng.integers(-127, 128, shape)
        size = (shape[axis],) if self.per_channel else ()
        inputs = [
            self.store(f"{name}.codes", codes, np.int8),
            self.store(f"{name}.scale", np.full(size, WEIGHT_SCALE)),
            self.store(f"{name}.zero", np.zeros(size), np.int8),
        ]
        return self.node("DequantizeLinear", f"{name}.weight", inputs, axis=axis)

    def conv(
        self, name: str, value: str, shape: tuple[int, ...], kind: str = "Conv", axis: int = 0, **attributes: object
    ) -> str:
        if kind == "Conv":
            attributes["pads"] = [1, 1, 1, 1]
        bias = self.store(f"{name}.bias", np.zeros(shape[axis]))
        return self.node(kind, name, [value, self.weight(name, shape, axis), bias], **attributes)

    def gemm(self, name: str, value: str) -> str:
        return self.node("Gemm", name, [value, self.weight(name, (4, 3), 1), self.store(f"{name}.bias", np.zeros(3))])

    # -- for those who plant something ----------------------------------------------------------------------------

    def find(self, name: str) -> onnx.NodeProto:
        return next(node for node in self.model.graph.node if node.name == name)

    def set(self, name: str, values: object, dtype: object = None) -> None:
        """Store other values under a name."""
        tensor = next(tensor for tensor in self.model.graph.initializer if tensor.name == name)
        kind = numpy_helper.to_array(tensor).dtype if dtype is None else dtype
        tensor.CopyFrom(numpy_helper.from_array(np.array(values, kind), name))

    def get(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(next(tensor for tensor in self.model.graph.initializer if tensor.name == name))

    def add(self, name: str, values: object, dtype: object = np.float32) -> str:
        self.model.graph.initializer.append(numpy_helper.from_array(np.array(values, dtype), name))
        return name

    def insert(self, node: onnx.NodeProto, before: str) -> None:
        nodes = self.model.graph.node
        nodes.insert([each.name for each in nodes].index(before), node)

    def quantize_bias(self, name: str, scale: object, zero: object = 0, dtype: object = np.int32) -> None:
        """Let a layer read an integer bias."""
        size = self.get(f"{name}.bias").shape
        inputs = [
            self.add(f"{name}.bias.codes", np.zeros(size), dtype),
            self.add(f"{name}.bias.scale", np.broadcast_to(scale, size)),
            self.add(f"{name}.bias.zero", np.broadcast_to(zero, size), dtype),
        ]
        made = helper.make_node("DequantizeLinear", inputs, [f"{name}.bias.out"], name=f"{name}.bias.dq", axis=0)
        self.insert(made, name)
        self.find(name).input[2] = f"{name}.bias.out"
