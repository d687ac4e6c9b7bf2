"""A quantized ONNX graph as the rules look at it: layers, their grids, and the pairs on activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from repapq_plugin.core.onnx_weights import WEIGHTED_OPERATORS

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

    Array = npt.NDArray[np.generic]

MOVING = ("Pad", "Slice", "Concat", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "MaxPool")
"""Operators that hand codes on as they are: a grid in front of them is one behind them."""

OUTSIDE = (
    "QLinear",
    "QGemm",
    "ConvInteger",
    "MatMulInteger",
    "DynamicQuantize",
    "FakeQuantize",
    "DynamicQuantizeMatMul",
)
"""How operators are called that quantize in another form than pairs."""


@dataclass(frozen=True)
class Grid:
    """What a QuantizeLinear or DequantizeLinear node says.

    Args:
        scale: Float64, scalar or ``(channels,)``; ``None`` if it is not stored but computed.
        zero_point: Int64 of the same shape, or ``None`` if it is computed.
        dtype: Name of the integer type.
        axis: Axis of the channels, as it stands in the node.
    """

    scale: npt.NDArray[np.float64] | None
    zero_point: npt.NDArray[np.int64] | None
    dtype: str
    axis: int

    def equals(self, other: Grid) -> bool:
        """Whether both have the very same scales and zero points; computed ones are equal to none."""
        if self.scale is None or self.zero_point is None or other.scale is None or other.zero_point is None:
            return False
        same_scales = np.array_equal(self.scale.ravel(), other.scale.ravel())
        return same_scales and np.array_equal(self.zero_point.ravel(), other.zero_point.ravel())

    def __str__(self) -> str:
        """Say type, scale and zero point in a few words."""
        scale = "computed" if self.scale is None else f"{self.scale.size} scales"
        if self.scale is not None and self.scale.size == 1:
            scale = f"scale {float(self.scale.ravel()[0]):.6g}"
        zeros = [] if self.zero_point is None else sorted(set(self.zero_point.ravel().tolist()))
        return f"{self.dtype}, {scale}, zero point {', '.join(map(str, zeros[:3])) or 'computed'}"


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product.

    Args:
        node: Its node.
        weight: Grid of its weight, if that is stored in integers or quantized where it stands.
        codes: The stored integers of the weight, if they are stored; real weights otherwise, or ``None``.
        source: The DequantizeLinear whose values it reads, if it reads such.
    """

    node: onnx.NodeProto
    weight: Grid | None
    codes: Array | None
    source: onnx.NodeProto | None

    @property
    def is_integer(self) -> bool:
        """Whether its weight is quantized."""
        return self.weight is not None


class QuantizedGraph:
    """The view of one model.

    Args:
        model: The ONNX model; not changed.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        import onnx.numpy_helper

        self.model, self.nodes = model, list(model.graph.node)
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self._stored[node.output[0]] = node.attribute[0].t
        self._array = onnx.numpy_helper.to_array
        self.made = {name: node for node in self.nodes for name in node.output if node.op_type != "Constant"}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    @property
    def opset(self) -> int:
        """The version of the standard operators."""
        return max((each.version for each in self.model.opset_import if each.domain in ("", "ai.onnx")), default=0)

    def stored(self, name: str) -> Array | None:
        """Return the array of a stored value, or ``None`` for one that is computed or absent."""
        return self._array(self._stored[name]) if name in self._stored else None

    def attribute(self, node: onnx.NodeProto, name: str, default: int) -> int:
        """Return a whole number that stands in a node."""
        return next((int(each.i) for each in node.attribute if each.name == name), default)

    def grid(self, node: onnx.NodeProto) -> Grid:
        """Return what a QuantizeLinear or DequantizeLinear node says; the default zero point is 0 of uint8."""
        import onnx

        scale = self.stored(node.input[1])
        if len(node.input) > 2 and node.input[2]:
            zero_point = self.stored(node.input[2])
            dtype = "computed" if zero_point is None else zero_point.dtype.name
        else:
            zero_point = None if scale is None else np.zeros(scale.shape, np.uint8)
            codes = self.stored(node.input[0]) if node.op_type == "DequantizeLinear" else None
            said = self.attribute(node, "output_dtype", 0)
            dtype = "uint8" if codes is None else codes.dtype.name
            if said:
                dtype = onnx.helper.tensor_dtype_to_np_dtype(said).name
        return Grid(
            None if scale is None else scale.astype(np.float64),
            None if zero_point is None else zero_point.astype(np.int64),
            dtype,
            self.attribute(node, "axis", 1),
        )

    def maker(self, name: str) -> onnx.NodeProto | None:
        """Return what computes a value, behind operators that only move it."""
        node = self.made.get(name)
        while node is not None and node.op_type in MOVING and node.op_type != "Concat":
            node = self.made.get(node.input[0])
        return node

    def dequantized(self, name: str) -> onnx.NodeProto | None:
        """Return the DequantizeLinear of computed codes that a value comes from, behind operators that move it."""
        node = self.maker(name)
        return node if node is not None and node.op_type == "DequantizeLinear" and self._of_activation(node) else None

    def _of_activation(self, dequantize: onnx.NodeProto) -> bool:
        source = dequantize.input[0]
        maker = self.made.get(source)
        if maker is not None and maker.op_type == "QuantizeLinear":
            return maker.input[0] not in self._stored
        return source not in self._stored

    def of_operator(self, *kinds: str) -> Iterator[onnx.NodeProto]:
        """Yield the nodes of some standard operators."""
        return (node for node in self.nodes if node.op_type in kinds and node.domain in ("", "ai.onnx"))

    @cached_property
    def activation_quantizers(self) -> list[onnx.NodeProto]:
        """QuantizeLinear nodes of computed values."""
        return [node for node in self.of_operator("QuantizeLinear") if node.input[0] not in self._stored]

    @cached_property
    def layers(self) -> list[Layer]:
        """Convolutions and matrix products that have a stored weight."""
        found = (self._layer(node) for node in self.of_operator(*WEIGHTED_OPERATORS))
        return [layer for layer in found if layer is not None]

    def _layer(self, node: onnx.NodeProto) -> Layer | None:
        weight, transposed = node.input[1], False
        maker = self.made.get(weight)
        if maker is not None and maker.op_type == "Transpose":
            weight, transposed = maker.input[0], True
            maker = self.made.get(weight)
        source = self.dequantized(node.input[0])
        if maker is None:
            return Layer(node, None, self.stored(weight), source) if weight in self._stored else None
        if maker.op_type != "DequantizeLinear" or self._of_activation(maker):
            return None
        grid, codes = self.grid(maker), self.stored(maker.input[0])
        if codes is None:  # quantized where it stands
            codes = self.stored(self.made[maker.input[0]].input[0])
        if transposed and codes is not None:
            codes = codes.T
            grid = Grid(grid.scale, grid.zero_point, grid.dtype, codes.ndim - 1 - grid.axis % codes.ndim)
        return Layer(node, grid, codes, source)

    def output_axis(self, layer: Layer) -> int:
        """Return along which axis of its weight the output channels of a layer lie."""
        rank = 4 if layer.codes is None else layer.codes.ndim
        match layer.node.op_type:
            case "Conv":
                return 0
            case "ConvTranspose":
                return 1
            case "Gemm":
                return 0 if self.attribute(layer.node, "transB", 0) else 1
            case _:
                return rank - 1

    def is_constant(self, name: str) -> bool:
        """Whether a value is stored, or dequantized from stored codes."""
        maker = self.made.get(name)
        return name in self._stored or (
            maker is not None and maker.op_type == "DequantizeLinear" and not self._of_activation(maker)
        )

    def quantizers_behind(self, dequantize: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return the QuantizeLinear nodes whose codes a DequantizeLinear reads, behind operators that move codes."""
        names, found, seen = [dequantize.input[0]], [], set()
        while names:
            name = names.pop()
            node = self.made.get(name)
            if node is None or name in seen:
                continue
            seen.add(name)
            if node.op_type == "QuantizeLinear":
                found.append(node)
            elif node.op_type in MOVING:
                names += list(node.input) if node.op_type == "Concat" else [node.input[0]]
        return found
