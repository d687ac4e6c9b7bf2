"""esp-ppq: ranges, LSQ and learned rounding on blocks of the graph, at any bit width.

Its own quantizers stand at 8 bits; the one below is its TensorRT one on the scheme of the job: weights symmetric per
output channel, activations affine per tensor, the layers that read the input and write the output at bits of their own.
What it delivers is simulated by its own executor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
"""Operators with weights."""

LSQ_RATE = {True: 1e-5, False: 1e-4}
"""Rate of LSQ at 8 bits (its default) and below (our choice: a grid of fewer bits has larger steps)."""


def quantize(
    job: Mapping[str, Any], batches: Sequence[Array], folder: Path
) -> tuple[Callable[[Array], Sequence[Array]], dict[str, str]]:
    """Quantize an ONNX network, and return what simulates it."""
    import torch
    from esp_ppq import lib
    from esp_ppq.api import QuantizationSettingFactory, export_ppq_graph, quantize_onnx_model
    from esp_ppq.core import QuantizationPolicy, QuantizationProperty, QuantizationStates, TargetPlatform
    from esp_ppq.executor import TorchExecutor
    from esp_ppq.quantization.quantizer import TensorRTQuantizer

    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    weight_bits, input_bits = job["weight_bits"], job["activation_bits"]
    ends = job["first_last_bits"]
    observer = "minmax" if job["method"] == "min-max" else "mse"
    affine = QuantizationPolicy(
        QuantizationProperty.ASYMMETRICAL + QuantizationProperty.LINEAR + QuantizationProperty.PER_TENSOR
    )

    def configured(quantizer: Any, operation: Any) -> Any:
        """Give each tensor of an operator the grid that the job says."""
        found = TensorRTQuantizer.init_quantize_config(quantizer, operation)
        order = quantizer._graph.topological_sort()
        layers = [other for other in order if other.type in WEIGHTED]
        is_end = ends is not None and operation in (layers[0], layers[-1])
        # What stands between the last two layers hands on the input of the last one.
        near_end = ends is not None and order.index(operation) > order.index(layers[-2 if layers[1:] else 0])
        for index, tensor in enumerate(found.input_quantization_config):
            if index == 1 and operation.type in WEIGHTED and operation.inputs[1].is_parameter:
                symmetric(tensor, ends if is_end else weight_bits)
            elif tensor.state != QuantizationStates.FP32:
                unsigned(tensor, ends if is_end or near_end else input_bits)
        # What the last but one layer gives is read, through those between, by the last one.
        before_end = ends is not None and len(layers) > 1 and operation is layers[-2]
        for tensor in found.output_quantization_config:
            if operation is layers[-1]:
                tensor.state = QuantizationStates.FP32
            elif tensor.state != QuantizationStates.FP32:
                unsigned(tensor, ends if near_end or before_end else input_bits)
        return found

    def symmetric(tensor: Any, bits: int) -> None:
        tensor.num_of_bits = bits
        tensor.quant_min, tensor.quant_max = 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1

    def unsigned(tensor: Any, bits: int) -> None:
        tensor.num_of_bits, tensor.policy = bits, affine
        tensor.quant_min, tensor.quant_max = 0, 2**bits - 1
        tensor.observer_algorithm = observer

    on_scheme = type("OnScheme", (TensorRTQuantizer,), {"init_quantize_config": configured})
    lib.register_network_quantizer(on_scheme, TargetPlatform.TRT_INT8)
    setting = QuantizationSettingFactory.trt_setting()
    setting.quantize_activation_setting.calib_algorithm = observer
    if job["method"] == "lsq":
        setting.lsq_optimization = True
        learning = setting.lsq_optimization_setting
        learning.lr = LSQ_RATE[min(weight_bits, input_bits) == 8]
    elif job["method"] == "rounding":
        setting.blockwise_reconstruction = True
        learning = setting.blockwise_reconstruction_setting
        learning.is_scale_trainable = True
    if job["method"] in ("lsq", "rounding"):
        learning.collecting_device = "cpu"
        learning.steps = job["steps"] or learning.steps
    tensors = [torch.from_numpy(batch) for batch in batches]
    graph = quantize_onnx_model(
        onnx_import_file=job["onnx"],
        calib_dataloader=tensors,
        calib_steps=max(8, len(tensors)),  # it wants at least eight
        input_shape=list(tensors[0].shape),
        platform=TargetPlatform.TRT_INT8,
        setting=setting,
        collate_fn=lambda batch: batch,
        device="cpu",
    )
    executor = TorchExecutor(graph=graph, device="cpu")

    def run(array: Array) -> Sequence[Array]:
        with torch.no_grad():
            return [output.numpy() for output in executor(torch.from_numpy(array))]

    if {weight_bits, input_bits, ends or 8} != {8}:
        return run, {"note": "esp-ppq writes no file with fewer than 8 bits"}
    target = folder / "network.onnx"
    export_ppq_graph(graph, TargetPlatform.ONNXRUNTIME, str(target), str(folder / "network.json"))
    open_batch(target)
    return run, {"file": str(target)}


def open_batch(path: Path) -> None:
    """Leave the first axis of a file's inputs and outputs open, which is written with the size it was calibrated at."""
    import onnx

    model = onnx.load(str(path))
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(model, str(path))
