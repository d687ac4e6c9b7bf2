"""onnxruntime's own static quantization: QDQ, 8 bits, weights symmetric per channel, activations affine per tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

RANGES = {"min-max": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
"""Names of its calibration methods."""


def quantize(
    job: Mapping[str, object], batches: Sequence[Array], folder: Path
) -> tuple[Callable[[Array], Sequence[Array]], dict[str, str]]:
    """Write a QDQ file, and return what runs it."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize_file
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, target = folder / "prepared.onnx", folder / "network.onnx"
    quant_pre_process(job["onnx"], prepared, skip_symbolic_shape=True)
    name = onnxruntime.InferenceSession(str(prepared), providers=["CPUExecutionProvider"]).get_inputs()[0].name

    class Reader:
        """Hands over one batch after the other."""

        def __init__(self) -> None:
            self.rest: Iterator[Array] = iter(batches)

        def get_next(self) -> dict[str, Array] | None:
            """Return the next batch by the input's name."""
            batch = next(self.rest, None)
            return None if batch is None else {name: batch}

    quantize_file(
        str(prepared),
        str(target),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
        calibrate_method=getattr(CalibrationMethod, RANGES[str(job["method"])]),
    )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # the file as it is written
    options.intra_op_num_threads = int(str(job["threads"]))
    session = onnxruntime.InferenceSession(str(target), options, providers=["CPUExecutionProvider"])
    return lambda array: session.run(None, {name: array}), {"file": str(target)}
