"""The checker is silent about clean graphs, and finds what was planted, by node and rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import nn

from repapq_plugin import RepAPQConfig, export_onnx, quantize_model
from repapq_plugin.errors import ConfigError, ExportError
from repapq_plugin.export.check import check_onnx
from repapq_plugin.export.check.rules import CHECKS, REMEDIES
from repapq_plugin.targets import TARGETS, Target
from repapq_plugin.targets.target import RULES
from tests.support.checked_graphs import SCALE, WEIGHT_SCALE, Clean
from tests.support.export_networks import NETWORKS, make_for
from tests.support.networks import Chain, Pyramid, Tied, batches, settle

PER_TENSOR = Target("per tensor", weights_per_channel=False, signed_activations=True)
POWERS = Target("powers", signed_activations=True, symmetric_activations=True, power_of_two_scales=True)
INTEGER_BIAS = Target("integer bias", signed_activations=True, bias="int32")
OWN = {target.name: target for target in (PER_TENSOR, POWERS, INTEGER_BIAS)}
ALL = {**TARGETS, **OWN}


def graph_for(target: Target) -> Clean:
    clean = Clean("int8" if target.signed_activations else "uint8", per_channel=target.weights_per_channel)
    if target.bias == "int32":
        for name in ("conv1", "conv2", "conv3", "up", "fc"):
            clean.quantize_bias(name, SCALE * WEIGHT_SCALE)
    return clean


def test_every_rule_has_a_check_and_a_remedy() -> None:
    assert set(CHECKS) == set(REMEDIES) == set(RULES)


@pytest.mark.parametrize("target", ALL.values(), ids=ALL)
def test_a_clean_graph_has_no_findings(target: Target) -> None:
    clean = graph_for(target)
    onnx.checker.check_model(clean.model, full_check=True)
    assert check_onnx(clean.model, target) == []


Plant = Callable[[Clean], None]


def opset(version: int) -> Plant:
    def plant(clean: Clean) -> None:
        clean.model.opset_import[0].version = version

    return plant


def other_operator(kind: str, domain: str = "") -> Plant:
    def plant(clean: Clean) -> None:
        clean.insert(helper.make_node(kind, ["x"], ["foreign.out"], name="foreign", domain=domain), "conv1")

    return plant


def stored(name: str, values: object, dtype: object = None) -> Plant:
    return lambda clean: clean.set(name, values, dtype)


def both(*plants: Plant) -> Plant:
    def plant(clean: Clean) -> None:
        for each in plants:
            each(clean)

    return plant


def reads(name: str, place: int, value: str) -> Plant:
    def plant(clean: Clean) -> None:
        clean.find(name).input[place] = value

    return plant


def axis(name: str, wrong: int) -> Plant:
    def plant(clean: Clean) -> None:
        clean.find(f"{name}.weight").attribute[0].i = wrong

    return plant


def bias(name: str, *args: object) -> Plant:
    return lambda clean: clean.quantize_bias(name, *args)


def another_scale_behind(clean: Clean) -> None:
    clean.find("a1.dq").input[1] = clean.add("other", 2 * SCALE)


def computed_scale(clean: Clean) -> None:
    clean.insert(helper.make_node("Abs", ["a1.scale"], ["computed"], name="abs"), "a1.q")
    clean.find("a1.q").input[1] = clean.find("a1.dq").input[1] = "computed"


def codes_read_elsewhere(clean: Clean) -> None:
    clean.insert(helper.make_node("Cast", ["a1.q.out"], ["cast.out"], name="cast", to=1), "conv2")


def minus_128(clean: Clean) -> None:
    codes = clean.get("conv2.codes").copy()
    codes[0, 0, 0, 0] = -128
    clean.set("conv2.codes", codes)


def float_weight(clean: Clean) -> None:
    clean.find("conv2").input[1] = clean.add("real", np.ones((4, 4, 3, 3)))


def quantized_in_place(clean: Clean) -> None:
    """A weight that is float in the file and rounded where it stands, on a grid that is not symmetric."""
    clean.set("conv2.zero", np.full(4, 5), np.int8)
    clean.add("real", np.ones((4, 4, 3, 3)))
    grid = ["conv2.scale", "conv2.zero"]
    made = helper.make_node("QuantizeLinear", ["real", *grid], ["real.q.out"], name="real.q", axis=0)
    clean.insert(made, "conv2.weight")
    clean.find("conv2.weight").input[0] = "real.q.out"


def transposed_weight(clean: Clean) -> None:
    """A matrix product whose weight is turned around behind its DequantizeLinear, with scales along its inputs."""
    clean.insert(helper.make_node("Transpose", ["fc.weight.out"], ["fc.turned"], name="turn", perm=[1, 0]), "fc")
    codes = clean.get("fc.codes").T.copy()
    clean.set("fc.codes", codes)  # (3, 4): output channels along axis 0
    clean.find("fc").input[1] = "fc.turned"
    clean.set("fc.scale", np.full(4, WEIGHT_SCALE))
    clean.set("fc.zero", np.zeros(4), np.int8)


def skip_is_float(clean: Clean) -> None:
    clean.find("residual").input[1] = "conv1.out.relu.out"


def other_grid_joined(clean: Clean) -> None:
    clean.set("a2.scale", 2 * SCALE)


def pairs_around_sigmoid(kind: str = "Sigmoid") -> Plant:
    def plant(clean: Clean) -> None:
        node = clean.find("sigmoid")
        node.op_type = kind
        clean.find("sigmoid").input[0] = "a3.dq.out"
        grid = ["a3.scale", "a3.zero"]
        made = helper.make_node("QuantizeLinear", ["sigmoid.out", *grid], ["after.q.out"], name="after.q")
        clean.model.graph.node.append(made)

    return plant


PLANTED: list[tuple[str, str, Plant, str, str]] = [
    ("old operators", "generic", opset(12), "opset", ""),
    ("newer than TensorRT", "tensorrt", opset(26), "opset", ""),
    ("newer than RKNN", "rknn", opset(20), "opset", ""),
    ("QLinearConv", "tensorrt", other_operator("QLinearConv"), "format", "foreign"),
    ("contrib QLinearAdd", "qnn", other_operator("QLinearAdd", "com.microsoft"), "format", "foreign"),
    ("contrib pair", "onnxruntime", other_operator("QuantizeLinear", "com.microsoft"), "format", "foreign"),
    ("dynamic", "litert", other_operator("DynamicQuantizeLinear"), "format", "foreign"),
    ("FakeQuantize", "openvino", other_operator("FakeQuantize", "org.openvinotoolkit"), "format", "foreign"),
    ("uint8 activation", "tensorrt", stored("a1.zero", 0, np.uint8), "activation_type", "a1.q"),
    ("uint8 on a phone", "executorch", stored("a1.zero", 0, np.uint8), "activation_type", "a1.q"),
    ("int8 for OpenVINO", "openvino", stored("a1.zero", 0, np.int8), "activation_type", "a1.q"),
    ("int8 for QNN", "qnn", stored("a1.zero", 0, np.int8), "activation_type", "a1.q"),
    ("int16 for LiteRT", "litert", stored("a1.zero", 0, np.int16), "activation_type", "a1.q"),
    ("affine for TensorRT", "tensorrt", stored("a2.zero", -128), "activation_zero_point", "a2.q"),
    ("affine for Core ML", "coreml", stored("a2.zero", 1), "activation_zero_point", "a2.q"),
    (
        "activation per channel",
        "openvino",
        both(stored("a1.scale", [SCALE] * 4), stored("a1.zero", [0] * 4)),
        "activation_granularity",
        "a1.q",
    ),
    ("uint8 weight", "tensorrt", stored("conv1.zero", [0] * 4, np.uint8), "weight_type", "conv1"),
    ("uint8 weight, phone", "litert", stored("fc.zero", [0] * 3, np.uint8), "weight_type", "fc"),
    ("weight zero point", "litert", stored("conv2.zero", [0, 0, 3, 0]), "weight_zero_point", "conv2"),
    ("weight zero point in place", "tensorrt", quantized_in_place, "weight_zero_point", "conv2"),
    ("-128", "tensorrt", minus_128, "weight_range", "conv2"),
    ("-128 on a phone", "executorch", minus_128, "weight_range", "conv2"),
    ("convolution along inputs", "executorch", axis("conv1", 1), "weight_axis", "conv1"),
    ("matrix product along inputs", "generic", axis("fc", 0), "weight_axis", "fc"),
    ("turned matrix product", "tensorrt", transposed_weight, "weight_axis", "fc"),
    ("transposed along inputs", "onnxruntime", axis("up", 0), "weight_axis", "up"),
    (
        "too few scales",
        "rknn",
        both(stored("conv3.scale", [WEIGHT_SCALE] * 3), stored("conv3.zero", [0] * 3)),
        "weight_axis",
        "conv3",
    ),
    ("one scale wanted", "per tensor", both(stored("fc.scale", [1.0] * 3), stored("fc.zero", [0] * 3)),
     "weight_granularity", "fc"),
    ("no power of two", "powers", stored("a3.scale", 0.03), "power_of_two", "a3.q"),
    ("no power of two, weight", "powers", stored("fc.scale", [0.1] * 3), "power_of_two", "fc.weight"),
    ("scale 0", "generic", stored("a1.scale", 0.0), "scale", "a1.q"),
    ("scale NaN", "tensorrt", stored("a1.scale", np.nan), "scale", "a1.q"),
    ("negative scale", "qnn", stored("conv1.scale", [-0.1] * 4), "scale", "conv1.weight"),
    ("infinite scale", "coreml", stored("a1.scale", np.inf), "scale", "a1.dq"),
    ("computed scale", "tensorrt", computed_scale, "scale", "a1.q"),
    ("another scale behind", "generic", another_scale_behind, "pairs", "a1.dq"),
    ("codes read elsewhere", "onnxruntime", codes_read_elsewhere, "pairs", "a1.q"),
    ("float input", "tensorrt", reads("conv3", 0, "concat.out"), "layer_input", "conv3"),
    ("float input, QNN", "qnn", reads("fc", 0, "flatten.out"), "layer_input", "fc"),
    ("float weight", "openvino", float_weight, "layer_weight", "conv2"),
    ("integer bias", "tensorrt", bias("conv1", SCALE * WEIGHT_SCALE), "bias", "conv1"),
    ("integer bias, XNNPACK", "executorch", bias("fc", SCALE * WEIGHT_SCALE), "bias", "fc"),
    ("scale of a bias", "litert", bias("conv1", SCALE), "bias", "conv1"),
    ("zero point of a bias", "onnxruntime", bias("conv2", SCALE * WEIGHT_SCALE, 1), "bias", "conv2"),
    ("int8 bias", "qnn", bias("conv2", SCALE * WEIGHT_SCALE, 0, np.int8), "bias", "conv2"),
    ("float bias", "integer bias", reads("conv1", 2, "conv1.bias"), "bias", "conv1"),
    ("float skip", "tensorrt", skip_is_float, "residual", "residual"),
    ("joined grids", "openvino", other_grid_joined, "shared_grid", "concat"),
    ("joined grids, LiteRT", "litert", other_grid_joined, "shared_grid", "concat"),
    ("joined grids, TensorRT", "tensorrt", other_grid_joined, "shared_grid", "concat"),
    ("sigmoid", "litert", pairs_around_sigmoid(), "float_operator", "sigmoid"),
    ("softmax", "executorch", pairs_around_sigmoid("Softmax"), "float_operator", "sigmoid"),
]  # fmt: skip


def test_there_are_enough_planted_violations_and_of_every_rule() -> None:
    assert len(PLANTED) >= 25
    assert {rule for *_, rule, _ in PLANTED} == set(RULES)
    assert {name for _, name, *_ in PLANTED} == set(ALL)


@pytest.mark.parametrize(
    ("name", "plant", "rule", "node"), [row[1:] for row in PLANTED], ids=[row[0] for row in PLANTED]
)
def test_a_planted_violation_is_found_at_its_node(name: str, plant: Plant, rule: str, node: str) -> None:
    target = ALL[name]
    clean = graph_for(target)
    plant(clean)
    findings = check_onnx(clean.model, target)
    (found, *_) = [each for each in findings if (each.rule, each.node) == (rule, node)]
    assert found.source == next(each.source for each in target.tested if each.key == rule)
    assert found.remedy == REMEDIES[rule] and found.broken and found.effect and found.demand == RULES[rule]
    assert all(part in str(found) for part in (rule, node, found.source, found.remedy))
    # Nothing else is blamed but what the same change breaks too.
    also = {
        "activation_type": {"layer_input", "pairs", "activation_zero_point"},
        "activation_zero_point": {"shared_grid"},
        "activation_granularity": {"shared_grid", "bias"},
        "weight_type": {"weight_axis"},
        "scale": {"pairs", "shared_grid", "bias", "power_of_two"},
        "pairs": {"shared_grid"},
        "weight_axis": set(),
        "format": {"activation_type"},
    }
    assert {each.rule for each in findings} <= {rule} | also.get(rule, set())


# -- our own files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("bits", [(8, 8), (4, 6)])
def test_our_own_files_have_no_findings(
    kind: type[nn.Module], target: Target, bits: tuple[int, int], tmp_path: Path
) -> None:
    model, x = make_for(kind, *bits, target)
    path = export_onnx(model, x, tmp_path / "model.onnx", opset=target.opset).path
    assert check_onnx(path, target) == []


@pytest.mark.parametrize("target", ALL.values(), ids=ALL)
@pytest.mark.parametrize("kind", [Chain, Pyramid, Tied])
def test_files_of_calibrated_networks_have_no_findings(kind: type[nn.Module], target: Target, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = settle(kind()), batches(1)
    own = dataclasses.replace(target, bias="either")  # exported biases are float, whatever a target wishes
    result = quantize_model(model, data, RepAPQConfig.from_preset("w4a6", target=own, steps=0))
    assert check_onnx(export_onnx(result, data[0], tmp_path / "model.onnx").path, own) == []


def test_a_file_for_one_target_is_wrong_for_another(tmp_path: Path) -> None:
    model, x = make_for(NETWORKS[1], 8, 8, TARGETS["generic"])
    path = export_onnx(model, x, tmp_path / "model.onnx").path
    assert {finding.rule for finding in check_onnx(path, "tensorrt")} == {"activation_type", "activation_zero_point"}


# -- what cannot be checked ---------------------------------------------------------------------------------------


def test_what_is_no_onnx_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(ExportError, match="There is no file"):
        check_onnx(path, "tensorrt")
    path.write_bytes(b"\x00not a model")
    with pytest.raises(ExportError, match="cannot be read as ONNX"):
        check_onnx(path, "tensorrt")
    path.write_bytes(b"")
    with pytest.raises(ExportError, match="holds no graph"):
        check_onnx(path, "tensorrt")
    with pytest.raises(ConfigError, match="Did you mean 'tensorrt'"):
        check_onnx(path, "tensort")


def test_a_float_file_breaks_nothing() -> None:
    node = helper.make_node("Relu", ["x"], ["y"], name="relu")
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph([node], "float", values[:1], values[1:]), opset_imports=[helper.make_opsetid("", 17)]
    )
    assert check_onnx(model, "tensorrt") == []
