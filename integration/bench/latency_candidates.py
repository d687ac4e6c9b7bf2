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

from repapq_plugin import CalibrationResult, RepAPQConfig, export_onnx, export_openvino, quantize_model
from repapq_plugin.evaluation.runtimes import OpenVINONetwork
from repapq_plugin.export.openvino import layer_kernels


@dataclass
class Prepared:
    """A float network, and what candidates are made of; each file and result is made when it is first wanted.

    Args:
        folder: For files.
        merged: The float network, branches merged.
        batches: What ranges are found on, float ``(N, 3, H, W)`` each.
        seed: Seed of the calibration.
    """

    folder: Path
    merged: nn.Module
    batches: list[Tensor]
    seed: int = 0
    results: dict[str, CalibrationResult] = field(default_factory=dict)

    @property
    def image(self) -> Tensor:
        """One image, float ``(1, 3, H, W)``."""
        return self.batches[0][:1].clone()

    @property
    def images(self) -> list[Tensor]:
        """All images that ranges are found on, one by one."""
        return [image[None] for batch in self.batches for image in batch]

    def result(self, target: str) -> CalibrationResult:
        """Return our INT8 for a target: ranges by min and max, nothing learned. Time does not depend on either."""
        if target not in self.results:
            config = RepAPQConfig.from_preset("w8a8", seed=self.seed, target=target).plain()
            self.results[target] = quantize_model(self.merged, self.batches, config)
        return self.results[target]

    def onnx(self, name: str) -> Path:
        """Return the ONNX file of the ``float`` network, or of ours for a target."""
        path = self.folder / f"{name}.onnx"
        if not path.exists():
            source = self.merged if name == "float" else self.result(name)
            export_onnx(source, self.image, path, dynamic_batch=False)
        return path

    def xml(self, name: str) -> Path:
        """Return the IR that OpenVINO makes of `onnx`."""
        path = self.folder / f"{name}.xml"
        if not path.exists():
            export_openvino(self.onnx(name), self.image, path)
        return path


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
    quantize_with_nncf(made.xml("float"), made.images, theirs)
    ours = made.xml("openvino")

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
        "float32": candidate(made.xml("float"), "f32"),
        "float by default": candidate(made.xml("float")),
        "RepAPQ": candidate(ours, against="NNCF"),
        "NNCF": candidate(theirs, rival=True),
        "RepAPQ, the rest float32": candidate(ours, "f32", against="NNCF, the rest float32"),
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

    def candidate(path: Path, **more: Any) -> Candidate:
        optimized = path.with_suffix(".optimized.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.optimized_model_filepath = str(optimized)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        kernels = Counter(node.op_type for node in onnx.load(optimized).graph.node)
        feed = {session.get_inputs()[0].name: made.image.numpy()}
        integer = any(kernel.startswith(("QLinear", "QGemm", "QAttention", "MatMulInteger")) for kernel in kernels)
        precision = "int8, the rest float32" if integer else "float32"
        return Candidate(lambda: session.run(None, feed), precision, kernels, **more)

    return {
        "float32": candidate(made.onnx("float")),
        "RepAPQ": candidate(made.onnx("onnxruntime"), against="onnxruntime, uint8"),
        "RepAPQ for any runtime": candidate(made.onnx("generic")),
        "onnxruntime, uint8": candidate(quantize_with_onnxruntime(made, signed=False), rival=True),
        "onnxruntime, int8": candidate(quantize_with_onnxruntime(made, signed=True), rival=True),
    }


def quantize_with_onnxruntime(made: Prepared, signed: bool) -> Path:
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
        quant_pre_process(str(made.onnx("float")), str(source))
    path = made.folder / f"theirs_{'s8' if signed else 'u8'}.onnx"
    kind = quantization.QuantType.QInt8 if signed else quantization.QuantType.QUInt8
    logging.getLogger().setLevel(logging.ERROR)
    quantization.quantize_static(
        str(source),
        str(path),
        Images(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=kind,
        weight_type=quantization.QuantType.QInt8,
    )
    return path


def on_inductor(made: Prepared, threads: int) -> dict[str, Candidate]:
    """Return float32, ours and pt2e's own X86InductorQuantizer, all compiled by inductor with freezing."""
    from torch._inductor import config as inductor
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    from repapq_plugin.hosts import pt2e

    image = made.image
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    inductor.freezing = True
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = prepare_pt2e(torch.export.export(made.merged, (image,)).module(), quantizer)
        for each in made.images:
            theirs(each)
        networks = {
            "float32": made.merged.eval(),
            "RepAPQ": convert_pt2e(pt2e.prepare_learned(made.result("generic"), (image,))),
            "pt2e": convert_pt2e(theirs),
        }
        compiled = {}
        for name, network in networks.items():
            run = torch.compile(network)
            try:
                run(image)
                compiled[name] = run
            except RuntimeError as error:  # inductor makes no kernel of YOLOv6-n's quantized transposed convolutions
                print(f"inductor cannot compile {name}: {str(error).strip().splitlines()[0]}")

    def candidate(name: str, precision: str, **more: Any) -> Candidate:
        return Candidate(lambda: compiled[name](image), precision, **more)

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
