"""What `latency` lets race: one network in float, as our INT8, and as the INT8 of each runtime's own tool."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repapq_plugin import CalibrationResult
from repapq_plugin.evaluation.runtimes import OpenVINONetwork
from repapq_plugin.export.openvino import layer_kernels


@dataclass(frozen=True)
class Prepared:
    """A network and the files that it stands in.

    Args:
        folder: Holds ``float.onnx``, ``float.xml``, ``generic.onnx``, ``generic.xml``, ``onnxruntime.onnx``.
        merged: The float network, branches merged.
        result: Our INT8, for the default target.
        image: Float ``(1, 3, H, W)``.
        images: Such images, which ranges were found on.
    """

    folder: Path
    merged: nn.Module
    result: CalibrationResult
    image: Tensor
    images: list[Tensor]


@dataclass(frozen=True)
class Candidate:
    """One that takes part.

    Args:
        run: Runs one image.
        precision: What it computes in.
        kernels: How many layers run on which kernel, as far as the runtime tells.
        against: Of ours: which other tool's it is compared with.
        rival: Whether another tool made it.
    """

    run: Callable[[], object]
    precision: str
    kernels: Mapping[str, int] = field(default_factory=dict)
    against: str = ""
    rival: bool = False


def on_openvino(made: Prepared, threads: int) -> dict[str, Candidate]:
    """Return float32, OpenVINO's default float, ours and NNCF's."""
    theirs = made.folder / "nncf.xml"
    quantize_with_nncf(made.folder / "float.xml", made.images, theirs)

    def candidate(path: Path, precision: str | None = None, **more: Any) -> Candidate:
        shapes = [tuple(made.image.shape)]
        network = OpenVINONetwork(path, threads=threads, precision=precision, input_shapes=shapes)
        request, array = network.request, made.image.numpy()
        kernels = Counter(layer_kernels(network.compiled).values())
        integer = any(kernel.lower().endswith("i8") for kernel in kernels)
        said = f"int8, the rest {network.precision}" if integer else network.precision
        # Without a copy on either side.
        return Candidate(lambda: request.infer([array], share_inputs=True, share_outputs=True), said, kernels, **more)

    return {
        "float32": candidate(made.folder / "float.xml", "f32"),
        "float by default": candidate(made.folder / "float.xml"),
        "RepAPQ": candidate(made.folder / "generic.xml", against="NNCF"),
        "NNCF": candidate(theirs, rival=True),
        "RepAPQ, the rest float32": candidate(made.folder / "generic.xml", "f32", against="NNCF, the rest float32"),
        "NNCF, the rest float32": candidate(theirs, "f32", rival=True),
    }


def quantize_with_nncf(float_xml: Path, images: list[Tensor], path: Path) -> None:
    """Quantize the float IR with NNCF's defaults and write the result."""
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    model = openvino.Core().read_model(float_xml)
    quantized = nncf.quantize(model, nncf.Dataset([image.numpy() for image in images]))
    openvino.save_model(quantized, path, compress_to_fp16=False)


def on_onnxruntime(made: Prepared, threads: int) -> dict[str, Candidate]:
    """Return float32 (its default), ours for it and for any runtime, and what its own static quantization makes."""
    import onnx
    import onnxruntime

    def candidate(name: str, **more: Any) -> Candidate:
        optimized = made.folder / f"{name}.optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.optimized_model_filepath = str(optimized)
        path = str(made.folder / f"{name}.onnx")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        kernels = Counter(node.op_type for node in onnx.load(optimized).graph.node)
        feed = {session.get_inputs()[0].name: made.image.numpy()}
        integer = any(kernel.startswith(("QLinear", "QGemm", "QAttention", "MatMulInteger")) for kernel in kernels)
        precision = "int8, the rest float32" if integer else "float32"
        return Candidate(lambda: session.run(None, feed), precision, kernels, **more)

    for signed in (False, True):
        quantize_with_onnxruntime(made, signed)
    return {
        "float32": candidate("float"),
        "RepAPQ": candidate("onnxruntime", against="onnxruntime, uint8"),
        "RepAPQ for any runtime": candidate("generic"),
        "onnxruntime, uint8": candidate("theirs_u8", rival=True),
        "onnxruntime, int8": candidate("theirs_s8", rival=True),
    }


def quantize_with_onnxruntime(made: Prepared, signed: bool) -> None:
    """Quantize the float file with onnxruntime's own static quantization: Q/DQ pairs, weights int8 per channel."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(made.images)

        def get_next(self) -> dict[str, Any] | None:
            image = next(self._left, None)
            return None if image is None else {"input": image.numpy()}

    source = made.folder / "float.pre.onnx"
    if not source.exists():
        quant_pre_process(str(made.folder / "float.onnx"), str(source))
    kind = quantization.QuantType.QInt8 if signed else quantization.QuantType.QUInt8
    logging.getLogger().setLevel(logging.ERROR)
    quantization.quantize_static(
        str(source),
        str(made.folder / f"theirs_{'s8' if signed else 'u8'}.onnx"),
        Images(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=kind,
        weight_type=quantization.QuantType.QInt8,
    )


def on_inductor(made: Prepared, threads: int) -> dict[str, Candidate]:
    """Return float32, ours and pt2e's own X86InductorQuantizer, all compiled by inductor with freezing."""
    from torch._inductor import config as inductor
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    from repapq_plugin.hosts import pt2e

    torch.set_num_threads(threads)
    torch._dynamo.reset()
    inductor.freezing = True
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = prepare_pt2e(torch.export.export(made.merged, (made.image,)).module(), quantizer)
        for image in made.images:
            theirs(image)
        networks = {
            "float32": made.merged,
            "RepAPQ": convert_pt2e(pt2e.prepare_learned(made.result, (made.image,))),
            "pt2e": convert_pt2e(theirs),
        }
        compiled = {}
        for name, network in networks.items():
            run = torch.compile(network)
            try:
                run(made.image)
                compiled[name] = run
            except RuntimeError as error:  # inductor makes no kernel of YOLOv6-n's quantized transposed convolutions
                print(f"inductor cannot compile {name}: {str(error).strip().splitlines()[0]}")

    def candidate(name: str, precision: str, **more: Any) -> Candidate:
        return Candidate(lambda: compiled[name](made.image), precision, **more)

    raced = {
        "float32": candidate("float32", "float32"),
        "RepAPQ": candidate("RepAPQ", "int8, the rest float32", against="pt2e"),
        "pt2e": candidate("pt2e", "int8, the rest float32", rival=True),
    }
    return {name: one for name, one in raced.items() if name in compiled}


RUNTIMES: Mapping[str, Callable[[Prepared, int], dict[str, Candidate]]] = {
    "openvino": on_openvino,
    "onnxruntime": on_onnxruntime,
    "inductor": on_inductor,
}
"""What makes the candidates of a runtime, from files and a number of threads."""
