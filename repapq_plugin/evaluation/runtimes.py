"""Exported networks as torch modules, so that a toolbox's own evaluation can score them."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from repapq_plugin.core.onnx_weights import separate_weights
from repapq_plugin.errors import ConfigError, ExportError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class RuntimeNetwork(nn.Module, ABC):
    """A network that runs elsewhere: takes torch tensors and returns torch tensors.

    The result is one tensor where the network has one output, else a tuple, on the device of the
    first input.
    """

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the network on its inputs, in the order of the graph."""
        arrays = [x.detach().cpu().contiguous().numpy() for x in inputs]
        outputs = tuple(torch.as_tensor(y).to(inputs[0].device) for y in self.run_arrays(arrays))
        return outputs[0] if len(outputs) == 1 else outputs

    @abstractmethod
    def run_arrays(self, arrays: list[npt.NDArray[np.generic]]) -> list[npt.NDArray[np.generic]]:
        """Run on arrays, in the order of the graph's inputs, and return arrays that are the caller's own."""


class OnnxRuntimeNetwork(RuntimeNetwork):
    """An ONNX file in onnxruntime, on the CPU.

    Args:
        path: The file.
        threads: Threads of one run; ``None`` lets onnxruntime choose.
        arithmetic: How layers with integer weights are computed.
            ``exact``: as the file says; the codes are multiplied as float numbers, which holds them
            all.
            ``integer``: in integers. onnxruntime then rounds each bias to a multiple of input scale
            times weight scale, which flips some codes by one; and it needs 8-bit activations, since
            it has no integer kernel that clamps to less.
            ``native``: as onnxruntime does by default: ``integer``, but on processors without VNNI
            its quickest kernels also saturate in 16 bits.

    Raises:
        ConfigError: ``arithmetic`` is none of the three.
        ExportError: onnxruntime is missing, or cannot load the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        arithmetic: Literal["exact", "integer", "native"] = "exact",
    ) -> None:
        super().__init__()
        if arithmetic not in ("exact", "integer", "native"):
            raise ConfigError(f"arithmetic={arithmetic!r} is not allowed; choose exact, integer or native.")
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise ExportError(
                "This needs the packages onnx and onnxruntime: pip install 'repapq-plugin[export]'"
            ) from error
        path = existing_file(path)
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            model = onnx.load(path)
            if arithmetic != "native":
                options.add_session_config_entry("session.x64quantprecision", "1")
                separate_weights(model.graph)
            self.session = onnxruntime.InferenceSession(
                model.SerializeToString(),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=["WeightBiasQuantization"] if arithmetic == "exact" else None,
            )
        except Exception as error:
            raise ExportError(f"onnxruntime cannot load {path}: {error}") from error
        self.input_names = [value.name for value in self.session.get_inputs()]

    def run_arrays(self, arrays: list[npt.NDArray[np.generic]]) -> list[npt.NDArray[np.generic]]:
        """Run one batch."""
        feeds = dict(zip(self.input_names, arrays, strict=True))
        outputs: list[npt.NDArray[np.generic]] = self.session.run(None, feeds)
        return outputs


class OpenVINONetwork(RuntimeNetwork):
    """An OpenVINO IR or ONNX file in OpenVINO.

    Args:
        path: The ``.xml`` or ``.onnx`` file.
        threads: Threads of one run; ``None`` lets OpenVINO choose.
        device: OpenVINO's name of the device.
        precision: What layers that are not integer compute in: ``f32`` for scoring; ``None`` leaves
            it to OpenVINO, which may take 16 bits where they are quicker.
        hint: OpenVINO's performance hint, ``LATENCY`` or ``THROUGHPUT``.
        input_shapes: Shapes to fix the inputs to, in order; ``None`` keeps those of the file.

    Raises:
        ExportError: OpenVINO is missing, or cannot load the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int | None = None,
        device: str = "CPU",
        precision: str | None = "f32",
        hint: str = "LATENCY",
        input_shapes: list[tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__()
        try:
            import openvino
        except ImportError as error:
            raise ExportError("This needs the openvino package: pip install 'repapq-plugin[export]'") from error
        path = existing_file(path)
        options: dict[str, str | int] = {"PERFORMANCE_HINT": hint}
        if precision is not None:
            options["INFERENCE_PRECISION_HINT"] = precision
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            core = openvino.Core()
            model = core.read_model(path)
            if input_shapes is not None:
                fixed = zip(model.inputs, input_shapes, strict=True)
                model.reshape({port: list(shape) for port, shape in fixed})
            self.compiled = core.compile_model(model, device, options)
        except (RuntimeError, ValueError) as error:
            raise ExportError(f"OpenVINO cannot load {path}: {error}") from error
        self.request = self.compiled.create_infer_request()

    @property
    def precision(self) -> str:
        """What layers that are not integer compute in here: ``f32``, ``bf16`` or ``f16``."""
        return str(self.compiled.get_property("INFERENCE_PRECISION_HINT").to_string())

    def run_arrays(self, arrays: list[npt.NDArray[np.generic]]) -> list[npt.NDArray[np.generic]]:
        """Run one batch."""
        # Copies: the request owns its output memory and writes the next batch over it.
        results = self.request.infer(arrays, share_inputs=True)
        return [results[port].copy() for port in self.compiled.outputs]


def existing_file(path: str | os.PathLike[str]) -> Path:
    """Return a path.

    Raises:
        ExportError: There is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"There is no file {path}; write it with an export first.")
    return path
