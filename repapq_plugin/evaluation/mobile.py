"""Files for phones in their runtimes, as torch modules: ExecuTorch's ``.pte`` and LiteRT's ``.tflite``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from repapq_plugin.core.installs import EXECUTORCH, LITERT
from repapq_plugin.errors import ExportError
from repapq_plugin.evaluation.runtimes import RuntimeNetwork, existing_file

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class ExecuTorchNetwork(RuntimeNetwork):
    """A ``.pte`` file in ExecuTorch's runtime for Python; it takes batches of the size that was exported.

    Args:
        path: The file.

    Raises:
        ExportError: executorch is missing, or cannot load the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        try:
            from executorch.runtime import Runtime
        except ImportError as error:
            raise ExportError(f"This needs an executorch built for this torch: {EXECUTORCH}") from error
        path = existing_file(path)
        try:
            self._program = Runtime.get().load_program(path)  # the method reads from it
            self._method = self._program.load_method("forward")
        except RuntimeError as error:
            raise ExportError(
                f"ExecuTorch cannot load {path}: {error}. If executorch.kernels.quantized was imported before, its "
                "XNNPACK is mixed up with torch's: load the file in a process without it."
            ) from error

    def run_arrays(self, arrays: list[npt.NDArray[np.generic]]) -> list[npt.NDArray[np.generic]]:
        """Run one batch.

        Raises:
            ExportError: The runtime refuses it.
        """
        try:
            # Copies: the method owns its output memory and writes the next batch over it.
            return [y.numpy().copy() for y in self._method.execute([torch.from_numpy(x) for x in arrays])]
        except RuntimeError as error:
            text = str(error).splitlines()[0]
            raise ExportError(
                f"ExecuTorch cannot run the batch: {text}. Give batches of the exported size; where it says that a "
                f"tensor has no device, this executorch was built for another torch than {torch.__version__}."
            ) from error


class LiteRTNetwork(RuntimeNetwork):
    """A ``.tflite`` file in LiteRT's interpreter; it takes batches of the size that was exported.

    Float inputs are rounded to the file's grid where it wants int8, and int8 outputs are made float.

    Args:
        path: The file.
        threads: Threads of one run; ``None`` lets LiteRT choose.
        delegate: Let XNNPACK compute what it can, as LiteRT does by default; without it its own kernels do.

    Raises:
        ExportError: ai-edge-litert is missing, or cannot load the file.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None, delegate: bool = True) -> None:
        super().__init__()
        try:
            from ai_edge_litert.interpreter import Interpreter, OpResolverType
        except ImportError as error:
            raise ExportError(f"This needs the ai-edge-litert package: {LITERT}") from error
        path = existing_file(path)
        resolver = OpResolverType.AUTO if delegate else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        try:
            self._interpreter = Interpreter(str(path), num_threads=threads, experimental_op_resolver_type=resolver)
            self._interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            raise ExportError(f"LiteRT cannot load {path}: {error}") from error

    def run_arrays(self, arrays: list[npt.NDArray[np.generic]]) -> list[npt.NDArray[np.generic]]:
        """Run one batch.

        Raises:
            ExportError: The runtime refuses it.
        """
        try:
            for place, x in zip(self._interpreter.get_input_details(), arrays, strict=True):
                self._interpreter.set_tensor(place["index"], _codes(x, *_grid(place)))
            self._interpreter.invoke()
        except (RuntimeError, ValueError) as error:
            raise ExportError(f"LiteRT cannot run the batch: {error}. Give batches of the exported size.") from error
        places = self._interpreter.get_output_details()
        return [_values(self._interpreter.get_tensor(place["index"]), *_grid(place)) for place in places]


def _grid(place: Mapping[str, Any]) -> tuple[float, int] | tuple[()]:
    """Return scale and zero point of an input or output; nothing where it is no int8 tensor."""
    import numpy as np

    if place["dtype"] is not np.int8:
        return ()
    scale, zero_point = place["quantization"]
    return float(scale), int(zero_point)


def _codes(x: npt.NDArray[np.generic], *grid: float) -> npt.NDArray[np.generic]:
    if not grid:
        return x
    codes = torch.round(torch.from_numpy(x) * (1.0 / grid[0])) + grid[1]
    codes_array: npt.NDArray[np.generic] = codes.clamp(-128, 127).to(torch.int8).numpy()
    return codes_array


def _values(codes: npt.NDArray[np.generic], *grid: float) -> npt.NDArray[np.generic]:
    if not grid:
        return codes
    values: npt.NDArray[np.generic] = ((torch.from_numpy(codes).float() - grid[1]) * grid[0]).numpy()
    return values
