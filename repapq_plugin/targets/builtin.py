"""The targets that come with the package. Each rule names the page, issue or code that states it.

A rule was taken over only where its source was read; what is our own advice says "our choice".
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from repapq_plugin.errors import ConfigError
from repapq_plugin.targets.target import GENERIC, Rule, Target

ONNX = "https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html"
TENSORRT = "https://docs.nvidia.com/deeplearning/tensorrt/latest/"
TENSORRT_TYPES = TENSORRT + "inference-library/work-quantized-types.html"
TENSORRT_QDQ = TENSORRT + "inference-library/quantized-types-explicit-quantization.html"
TENSORRT_11 = TENSORRT + "api/migration/tensorrt-10x-to-11x-python-api-reference.html"
TENSORRT_OPSET = TENSORRT + "reference/onnx-opset-guide.html"
TENSORRT_ZERO = "https://github.com/NVIDIA/TensorRT/issues/4698"
TENSORRT_RESIDUAL = "https://github.com/NVIDIA/TensorRT/issues/1992"
ONNXRUNTIME = "https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html"
OPENVINO = "https://docs.openvino.ai/2024/documentation/openvino-extensibility/openvino-plugin-library/advanced-guides/"
OPENVINO_LPT = OPENVINO + "low-precision-transformations.html"
OPENVINO_CONV = OPENVINO + "low-precision-transformations/step3-main/convolution/convolution.html"
OPENVINO_CPU = (
    "https://github.com/openvinotoolkit/openvino/blob/master/src/plugins/intel_cpu/src/transformations/"
    "transformation_pipeline.cpp"
)
OPENVINO_CONCAT = "https://docs.openvino.ai/latest/openvino_docs_OV_UG_lpt_step3_main.html"
XNNPACK = "https://docs.pytorch.org/executorch/stable/backends/xnnpack/xnnpack-quantization.html"
XNNPACK_QUANTIZER = "https://github.com/pytorch/ao/blob/main/torchao/testing/pt2e/_xnnpack_quantizer.py"
LITERT = "https://ai.google.dev/edge/litert/models/quantization_spec"
QNN = "https://onnxruntime.ai/docs/execution-providers/QNN-ExecutionProvider.html"
QNN_CONFIG = (
    "https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/python/tools/quantization/execution_providers/qnn/"
    "quant_config.py"
)
RKNN = "https://github.com/airockchip/rknn-toolkit2/blob/master/CHANGELOG.md"
RKNN_OPSET = "https://github.com/airockchip/rknn-toolkit2/issues/539"
RKNN_LOADED = "https://github.com/rockchip-linux/rknn-toolkit2/issues/292"
COREML = "https://apple.github.io/coremltools/docs-guides/source/opt-quantization-api.html"
COREML_WEIGHTS = "https://apple.github.io/coremltools/docs-guides/source/quantization-overview.html"
NARROW = "arXiv:2402.16121; our choice: QPR's fold may flip the sign of a code"

REFUSED = "the file is refused"
FLOAT = "the layer runs in float"
WRONG = "the file is read as other numbers"

FEWER = (
    "Grids of fewer than 8 bits are carried in 8-bit integers, behind a Clip: a file of them is as large and as fast."
)
ROUNDED = "It rounds biases to int32 at the product of both scales, and each result to the next grid."

MOVING = ("Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Resize")
"""ONNX operators that only move values (resizing to the nearest), so that integers run through them."""

COMMON = (
    Rule("opset", REFUSED, ONNX),
    Rule("format", "operators outside the ONNX standard are refused elsewhere", ONNX),
    Rule("scale", WRONG, ONNX),
    Rule("pairs", "values change between Q and DQ", ONNX),
    Rule("layer_input", FLOAT, ONNXRUNTIME),
    Rule("layer_weight", FLOAT, ONNXRUNTIME),
    Rule("bias", WRONG, ONNXRUNTIME),
)


def _rules(effect: str, source: str, *keys: str) -> tuple[Rule, ...]:
    """Return rules of one effect that stand in one source."""
    return tuple(Rule(key, effect, source) for key in keys)


def _symmetric_weights(source: str, effect: str = FLOAT) -> tuple[Rule, ...]:
    return _rules(effect, source, "weight_type", "weight_zero_point")


def _own(rules: tuple[Rule, ...], *own: Rule) -> tuple[Rule, ...]:
    """Return rules, with those of the same key replaced."""
    return (*(rule for rule in rules if rule.key not in {each.key for each in own}), *own)


_ALL = (
    Target(
        GENERIC,
        bias="either",
        notes=("Any runtime that reads affine activations and signed weights per channel.", FEWER),
        rules=(*COMMON, Rule("weight_axis", FLOAT, ONNXRUNTIME), Rule("activation_granularity", FLOAT, ONNXRUNTIME)),
    ),
    Target(
        "openvino",
        bias="either",
        quantized_operators=("Concat", "MaxPool", *MOVING),
        shared_grid_operators=("Concat",),
        activation_types=("uint8",),
        file="OpenVINO IR, or QDQ ONNX",
        notes=(
            "Convolutions read uint8; int8 with zero point 0 only with AMX or AVX2-VNNI-INT8, and in float elsewhere.",
            "Without VNNI or AMX, sums of 8-bit products saturate in 16 bits: quantize with reduce_range=True.",
            "Transposed convolutions run in integers only with zero point 0, and on processors without AVX-512 only "
            "with a fixed batch.",
            FEWER,
        ),
        rules=_own(
            (*COMMON, *_symmetric_weights(OPENVINO_LPT), Rule("weight_axis", FLOAT, OPENVINO_CONV)),
            Rule("activation_type", "convolutions run in float, unless the processor has AMX", OPENVINO_CPU),
            Rule("activation_granularity", FLOAT, OPENVINO_CONV),
            Rule("shared_grid", "the inputs are quantized again to one interval", OPENVINO_CONCAT),
        ),
    ),
    Target(
        "onnxruntime",
        bias="either",
        quantized_operators=("Concat", "MaxPool", "GlobalAveragePool", *MOVING),
        rounded_outputs=("Conv",),
        rounds_biases=True,
        weight_types=("int8", "uint8"),
        notes=(
            "Its integer kernels write integers, so what a convolution gives is rounded too, on a grid that learns.",
            "On x86 it turns int8 activations into uint8 ones where one operator reads them, and computes the others "
            "in float. Without VNNI, sums of 8-bit products saturate in 16 bits: quantize with reduce_range=True.",
            "The CUDA provider takes int8 only; for TensorRT's provider name tensorrt.",
            ROUNDED,
            FEWER,
        ),
        rules=(
            *COMMON,
            *_symmetric_weights(ONNXRUNTIME)[:1],
            *_rules(FLOAT, ONNXRUNTIME, "activation_type", "activation_granularity", "weight_axis"),
        ),
    ),
    Target(
        "tensorrt",
        signed_activations=True,
        symmetric_activations=True,
        quantizes_residuals=True,
        quantized_operators=("Add",),
        shared_grid_operators=("Concat",),
        max_opset=24,
        activation_types=("int8",),
        notes=(
            "Version 11 has no calibrator and no INT8 flag: it computes in integers what Q/DQ pairs say, nothing else.",
            "Of an addition behind a layer, only the skipping input is quantized; the other one is fused.",
            "There is no grid below 8 bits for activations, and its INT4 is for weights alone.",
            FEWER,
        ),
        rules=_own(
            COMMON,
            Rule("opset", REFUSED, TENSORRT_OPSET),
            Rule("format", REFUSED, TENSORRT_11),
            Rule("activation_type", WRONG, TENSORRT_TYPES),
            *_rules(REFUSED, TENSORRT_ZERO, "activation_zero_point", "weight_zero_point"),
            Rule("activation_granularity", REFUSED, TENSORRT_QDQ),
            Rule("weight_type", REFUSED, TENSORRT_TYPES),
            Rule("weight_range", "the code -128 lies outside the symmetric range", NARROW),
            *_rules(REFUSED, TENSORRT_QDQ, "weight_axis", "bias"),
            *_rules(FLOAT, TENSORRT_QDQ, "layer_input", "layer_weight"),
            Rule("residual", "the addition and the layer before it write floats", TENSORRT_RESIDUAL),
            Rule("shared_grid", "the inputs are scaled again one by one", TENSORRT_QDQ),
        ),
    ),
    Target(
        "executorch",
        signed_activations=True,
        quantized_operators=("Add", "Mul", "Concat", "GlobalAveragePool"),
        shared_grid_operators=("Concat",),
        float_operators=("Sigmoid", "Softmax", "HardSigmoid", "Exp", "LogSoftmax"),
        activation_types=("int8",),
        file="a .pte of export_executorch",
        notes=("XNNPACK quantizes biases itself, from float ones.", ROUNDED, FEWER),
        rules=_own(
            COMMON,
            *_symmetric_weights(XNNPACK),
            *_rules(FLOAT, XNNPACK_QUANTIZER, "activation_type", "weight_range", "weight_axis", "bias"),
            Rule("activation_granularity", FLOAT, XNNPACK),
            Rule("shared_grid", "the inputs are quantized again", XNNPACK),
            Rule("float_operator", "the pair around it is computed for nothing", XNNPACK),
        ),
    ),
    Target(
        "litert",
        signed_activations=True,
        bias="either",
        quantized_operators=("Add", "Mul", "Concat", "AveragePool", "MaxPool", "GlobalAveragePool"),
        shared_grid_operators=("Concat",),
        float_operators=("Sigmoid", "Softmax", "LogSoftmax", "Tanh"),
        activation_types=("int8",),
        file="a .tflite of export_litert",
        notes=(
            "Sigmoid, softmax and tanh have fixed output grids there: they stay float in a network of ours.",
            ROUNDED,
            FEWER,
        ),
        rules=_own(
            COMMON,
            *_symmetric_weights(LITERT, REFUSED),
            *_rules(
                REFUSED,
                LITERT,
                "activation_type",
                "activation_granularity",
                "weight_axis",
                "bias",
                "shared_grid",
                "float_operator",
            ),
            Rule("weight_range", WRONG, LITERT),
        ),
    ),
    Target(
        "qnn",
        bias="either",
        max_opset=24,
        activation_types=("uint8", "uint16"),
        weight_types=("int8", "uint8"),
        file="QDQ ONNX for onnxruntime's QNN provider",
        notes=("The HTP backend computes nothing in float32: give it as much as it takes in pairs.", ROUNDED, FEWER),
        rules=_own(
            COMMON,
            *_rules(FLOAT, QNN_CONFIG, "activation_type", "activation_granularity", "weight_type", "weight_axis"),
            *_rules(FLOAT, QNN, "layer_input", "layer_weight"),
        ),
    ),
    Target(
        "rknn",
        signed_activations=True,
        bias="either",
        max_opset=19,
        activation_types=("int8", "uint8"),
        notes=(
            "Load the file with load_onnx and build it with do_quantization=False, so that its grids are kept.",
            "Some versions of the toolkit take quantized files of one scale for each weight only: then give a Target "
            "of your own with weights_per_channel=False.",
            ROUNDED,
            FEWER,
        ),
        rules=_own(
            COMMON,
            *_symmetric_weights(RKNN),
            Rule("opset", REFUSED, RKNN_OPSET),
            Rule("activation_type", REFUSED, RKNN),
            *_rules(REFUSED, RKNN_LOADED, "activation_granularity", "weight_axis"),
        ),
    ),
    Target(
        "coreml",
        signed_activations=True,
        symmetric_activations=True,
        bias="either",
        activation_types=("int8",),
        file="what coremltools converts; the ONNX file shows grids and codes",
        notes=(
            "The Neural Engine multiplies int8 by int8 from the A17 Pro and the M4 on; before, weights are small only.",
            FEWER,
        ),
        rules=_own(
            COMMON,
            *_symmetric_weights(COREML_WEIGHTS),
            *_rules(FLOAT, COREML, "activation_type", "activation_zero_point", "activation_granularity"),
            Rule("weight_range", "the code -128 lies outside the symmetric range", NARROW),
            Rule("weight_axis", FLOAT, COREML_WEIGHTS),
        ),
    ),
)

TARGETS: Mapping[str, Target] = {target.name: target for target in _ALL}
"""Targets by the names that a configuration takes."""


def find_target(name: str) -> Target:
    """Return a target that comes with the package.

    Raises:
        ConfigError: There is none of this name; the message names all, and the nearest one.
    """
    if name in TARGETS:
        return TARGETS[name]
    near = difflib.get_close_matches(str(name).lower(), TARGETS, n=1, cutoff=0.5)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"target={name!r} is not allowed; choose one of {', '.join(map(repr, TARGETS))}, or give a Target of your "
        f"own.{meant}"
    )
