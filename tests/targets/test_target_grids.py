"""A network that is quantized for a target lies on that target's grid, in simulation, in its file and in runtimes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from repapq_plugin import CalibrationResult, RepAPQConfig, export_onnx, export_openvino, quantize_model
from repapq_plugin.backend import OwnQuantizer
from repapq_plugin.core.quant_primitives import choose_qparams, fake_quantize, powers_around, quantize
from repapq_plugin.core.tensors import floating_tensors
from repapq_plugin.evaluation.runtimes import OnnxRuntimeNetwork
from repapq_plugin.export.openvino import computes_integers
from repapq_plugin.method.starting_ranges import set_weight_range
from repapq_plugin.observers import OBSERVERS
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize, nearest_power_of_two
from repapq_plugin.quantizers.layers import QuantizedLayer
from repapq_plugin.quantizers.plan import input_quantizer, weight_quantizer
from repapq_plugin.targets import TARGETS, Target
from tests.support.comparing import equal
from tests.support.networks import Chain, Pyramid, batches, settle
from tests.support.placed import after

PER_TENSOR = Target("per tensor", weights_per_channel=False)
POWERS = Target("powers", signed_activations=True, symmetric_activations=True, power_of_two_scales=True)
OWN = (PER_TENSOR, POWERS, dataclasses.replace(POWERS, name="both", weights_per_channel=False))
ALL = (*TARGETS.values(), *OWN)
SYMMETRIC = [target for target in ALL if target.symmetric_activations]

values = st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=40)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return settle(Pyramid())


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    torch.manual_seed(1)
    return batches(2)


def quantized(network: nn.Module, data: list[Tensor], target: Target, **keys: object) -> CalibrationResult:
    config = RepAPQConfig.from_preset("w5a6", target=target, **{"steps": 3, **keys})
    return quantize_model(network, data, config)


def layers_of(result: CalibrationResult) -> list[QuantizedLayer]:
    return [module for module in result.model.modules() if isinstance(module, QuantizedLayer)]


def is_power_of_two(scale: Tensor) -> bool:
    return bool((torch.frexp(scale)[0] == 0.5).all())


@pytest.mark.parametrize("target", ALL, ids=lambda target: target.name)
def test_grids_are_those_of_the_target_after_learning(network: nn.Module, data: list[Tensor], target: Target) -> None:
    result = quantized(network, data, target)
    for layer in layers_of(result):
        weight, of_input = layer.weight_fake_quant, layer.input_fake_quant
        assert weight.per_channel == target.weights_per_channel
        assert weight.quant_min == -weight.quant_max and not weight.zero_point.any()
        assert weight.scale.shape == weight.zero_point.shape
        if not target.weights_per_channel:
            assert weight.scale.numel() == 1
        steps = 2**of_input.num_bits
        assert of_input.quant_min == (-steps // 2 if target.signed_activations else 0)
        assert of_input.quant_max - of_input.quant_min == steps - 1
        if target.symmetric_activations:
            assert not of_input.zero_point.any()
        if target.power_of_two_scales:
            assert is_power_of_two(weight.scale) and is_power_of_two(of_input.scale)
        assert torch.equal(weight(layer.weight), layer.weight)  # on its grid
    assert any(layer.input_fake_quant.num_bits == 6 for layer in layers_of(result))
    remarked = any("carried, code by code" in note for note in result.notes)
    assert remarked == (target.name != "generic")


@given(
    values=values, bits=st.integers(2, 8), target=st.sampled_from(SYMMETRIC), kind=st.sampled_from(sorted(OBSERVERS))
)
def test_a_symmetric_grid_has_zero_point_0_whoever_finds_the_range(
    values: list[float], bits: int, target: Target, kind: str
) -> None:
    quantizer = input_quantizer(bits, RepAPQConfig(target=target))
    low, high = quantizer.quant_min, quantizer.quant_max
    assert (low, high) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if kind.startswith("per_channel"):
        return
    observer = OBSERVERS[kind](dtype=quantizer.dtype, qscheme=quantizer.qscheme, quant_min=low, quant_max=high)
    observer(torch.tensor(values))
    scale, zero_point = observer.calculate_qparams()
    assert zero_point.tolist() == [0] and float(scale) > 0
    quantizer.set_qparams(scale, zero_point)
    quantizer.enable_observer(False)
    assert quantizer(torch.zeros(1)).tolist() == [0.0]


@given(values=values, bits=st.integers(2, 8))
def test_a_signed_affine_grid_is_the_unsigned_one_with_its_codes_shifted(values: list[float], bits: int) -> None:
    x, half = torch.tensor(values), 2 ** (bits - 1)
    grids = []
    for low in (0, -half):
        high = low + 2 * half - 1
        scale, zero_point = choose_qparams(x.min(), x.max(), low, high, symmetric=False)
        grids.append((scale, zero_point - low, quantize(x, scale, zero_point, low, high) - low))
    assert all(torch.equal(unsigned, signed) for unsigned, signed in zip(*grids, strict=True))


@pytest.mark.parametrize("name", ["executorch", "litert", "rknn", "openvino", "qnn"])
def test_affine_targets_compute_what_the_default_does_to_the_last_bit(
    network: nn.Module, data: list[Tensor], name: str
) -> None:
    wanted = quantized(network, data, TARGETS["generic"])
    result = quantized(network, data, TARGETS[name])
    assert equal(floating_tensors(result.model(data[0])), floating_tensors(wanted.model(data[0])))


@given(st.floats(2.0**-100, 2.0**100))
def test_scales_become_the_nearest_power_of_two_exactly(value: float) -> None:
    scale = torch.tensor([value], requires_grad=True)
    power = nearest_power_of_two(scale)
    assert is_power_of_two(power.detach())
    assert 2**-0.5001 <= power.item() / value <= 2**0.5001
    power.sum().backward()  # type: ignore[no-untyped-call]
    assert scale.grad is not None and scale.grad.tolist() == [1.0]


@pytest.mark.parametrize("target", [POWERS, OWN[2]], ids=lambda target: target.name)
@given(seed=st.integers(0, 2**32 - 1), bits=st.integers(2, 8))
def test_of_both_powers_of_two_a_weight_takes_the_better(target: Target, seed: int, bits: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(8, 6)
    grid = OwnQuantizer(weight_quantizer(layer, bits, RepAPQConfig(target=target)))
    observer = grid.observer("mse")
    observer(layer.weight.detach())
    set_weight_range(grid, layer.weight.detach(), RepAPQConfig(target=target))
    scale, zero_point = grid.qparams()

    def errors(scale: Tensor) -> Tensor:
        squares = (fake_quantize(layer.weight, scale, zero_point, *grid.bounds, grid.ch_axis) - layer.weight).square()
        return squares.sum(1) if target.weights_per_channel else squares.sum()[None]

    for power in powers_around(observer.calculate_qparams()[0]):
        assert (errors(scale) <= errors(power)).all()


@given(st.lists(st.floats(2.0**-90, 2.0**90), min_size=1, max_size=5))
def test_powers_of_two_around_scales(scales: list[float]) -> None:
    scale = torch.tensor(scales)
    low, high = powers_around(scale)
    assert is_power_of_two(low) and is_power_of_two(high)
    assert (low <= scale).all() and (scale < high).all()


@pytest.mark.parametrize("target", ALL, ids=lambda target: target.name)
def test_a_result_comes_back_equal_with_its_target(
    network: nn.Module, data: list[Tensor], target: Target, tmp_path: Path
) -> None:
    result = quantized(network, data, target)
    loaded = CalibrationResult.load(result.save(tmp_path / "result.safetensors"), network)
    assert loaded.config == result.config and loaded.config.runs_on == target
    assert equal(floating_tensors(loaded.model(data[0])), floating_tensors(result.model(data[0])))


@pytest.mark.parametrize("target", OWN, ids=lambda target: target.name)
def test_what_is_learned_is_what_stays_where_a_grid_cannot_take_the_affine_layer_in(
    network: nn.Module, data: list[Tensor], target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    """The fold of an affine layer inside changes no code: the last loss of learning is that of the result."""
    config = RepAPQConfig.from_preset("w4a8", target=target, steps=5, guard_fraction=0.0)
    job, _ = after("learn", network, data, config)
    layers = [module for module in job.backend.student.modules() if isinstance(module, QuantizedLayer)]
    assert all(layer.affine is not None and layer.affine.inside for layer in layers)
    with torch.no_grad():
        for layer in layers:
            assert layer.affine is not None
            layer.affine.gamma.mul_(torch.linspace(-1.5, 1.5, layer.affine.gamma.numel()))
            layer.affine.beta.add_(0.1)
        before = floating_tensors(job.backend.student(data[0]))
        job.backend.fold(nn.Module(), {})
        after_fold = floating_tensors(job.backend.student(data[0]))
    assert all(layer.affine is None for layer in layers)
    assert equal(after_fold, before)
    assert "quantized again" not in caplog.text


@pytest.mark.parametrize("target", ALL, ids=lambda target: target.name)
@pytest.mark.parametrize("bits", ["w8a8", "w4a6"])
def test_files_say_what_is_simulated_and_runtimes_stay_within_rounding(
    data: list[Tensor], target: Target, bits: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = settle(Chain())
    result = quantize_model(model, data, RepAPQConfig.from_preset(bits, target=target, steps=2))
    x = data[0]
    summary = export_onnx(result, x, tmp_path / "model.onnx")
    assert summary.max_rel_difference is not None and summary.max_rel_difference < 1e-5
    with torch.no_grad():
        expected = result.model(x)
    integer = OnnxRuntimeNetwork(tmp_path / "model.onnx", threads=1, arithmetic="integer")(x)
    error = (integer - expected).abs() / expected.abs().max()
    assert error.median() < 1e-2 and error.max() < 0.25
    import onnx

    graph = onnx.load(tmp_path / "model.onnx")
    assert graph.opset_import[0].version == target.opset
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    for node in graph.graph.node:
        if node.op_type == "QuantizeLinear":
            zero_point = onnx.numpy_helper.to_array(stored[node.input[2]])
            assert zero_point.dtype.name == ("int8" if target.signed_activations else "uint8")
            assert zero_point == 0 or not target.symmetric_activations


@pytest.mark.parametrize("target", [TARGETS["openvino"], TARGETS["qnn"], PER_TENSOR], ids=lambda t: t.name)
def test_openvino_runs_unsigned_activations_in_integers(data: list[Tensor], target: Target, tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = quantize_model(settle(Chain()), data, RepAPQConfig(target=target, steps=0, reduce_range=True))
    summary = export_openvino(result, data[0], tmp_path / "model.xml")
    assert summary.integer_layers == sum(map(computes_integers, summary.kernels.values()))
    assert summary.max_rel_difference is not None and summary.max_rel_difference < 1e-2


@pytest.mark.parametrize("target", [TARGETS["tensorrt"], TARGETS["executorch"]], ids=lambda t: t.name)
def test_openvino_computes_signed_activations_right_whatever_kernels_it_takes(
    data: list[Tensor], target: Target, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    result = quantize_model(settle(Chain()), data, RepAPQConfig(target=target, steps=0, reduce_range=True))
    summary = export_openvino(result, data[0], tmp_path / "model.xml")
    assert summary.max_rel_difference is not None and summary.max_rel_difference < 1e-2


@pytest.mark.parametrize(
    ("kernel", "integers"), [("brgconv_avx512_amx_I8", True), ("brgemm_avx512_i8", True), ("brgconv_avx512_f32", False)]
)
def test_integer_kernels_are_told_by_their_names(kernel: str, integers: bool) -> None:
    assert computes_integers(kernel) == integers


def test_the_end_of_a_range_is_counted_in_steps_of_the_grid() -> None:
    reach = {name: input_quantizer(8, RepAPQConfig(target=name)).reach for name in ("generic", "litert", "tensorrt")}
    assert reach == {"generic": 255, "litert": 255, "tensorrt": 127}
    assert LearnableFakeQuantize(quant_min=-7, quant_max=7, qscheme=torch.per_tensor_symmetric).reach == 7
