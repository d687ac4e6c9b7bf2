"""NNCF's post-training quantization of an ONNX network: 8 bits, its own choice of operators, bias correction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def quantize(
    job: Mapping[str, object], batches: Sequence[Array], folder: Path
) -> tuple[Callable[[Array], Sequence[Array]], dict[str, str]]:
    """Write a QDQ file, and return what runs it."""
    import nncf
    import onnx
    import onnxruntime

    model = onnx.load(str(job["onnx"]))
    name = model.graph.input[0].name
    # MIXED: weights symmetric, activations affine. The rest is what it does by itself.
    quantized = nncf.quantize(
        model,
        nncf.Dataset(batches, lambda batch: {name: batch}),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(batches),
        fast_bias_correction=job["method"] != "bias-correction",
    )
    target = folder / "network.onnx"
    onnx.save(quantized, str(target))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # the file as it is written
    options.intra_op_num_threads = int(str(job["threads"]))
    session = onnxruntime.InferenceSession(str(target), options, providers=["CPUExecutionProvider"])
    return lambda array: session.run(None, {name: array}), {"file": str(target)}
