"""OpenVINO: the written IR, its integer kernels, and what they compute on this very processor."""

from __future__ import annotations

from pathlib import Path

import openvino
import pytest
import torch
from torch import nn

from repapq_plugin.errors import ExportError
from repapq_plugin.evaluation.runtimes import OpenVINONetwork
from repapq_plugin.export import check_int8, export_onnx, export_openvino, int8_layers
from repapq_plugin.export.openvino import layer_kernels
from tests.support.disk import largest_file
from tests.support.export_networks import (
    NETWORKS,
    Chain,
    Classifier,
    Transposed,
    example,
    make,
    outputs_of,
    quantized,
    set_ranges,
)

# 7 bits of weights where activations have 8: exact on every processor (see saturation below).
BITS = [(7, 8), *(pytest.param(w, a, marks=pytest.mark.slow) for w, a in [(6, 6), (4, 4), (3, 5)])]


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize(("w", "a"), BITS)
def test_integer_kernels_compute_what_the_model_computes(kind: type[nn.Module], w: int, a: int, tmp_path: Path) -> None:
    model, x = make(kind, w, a)
    summary = export_openvino(model, x, tmp_path / "model.xml", dynamic_batch=False)
    assert summary.integer_layers == kind.layers
    assert len([k for k in summary.kernels.values() if k.endswith("I8")]) == kind.layers
    # Integer sums are exact; only scales, biases and activations are float.
    assert summary.max_rel_difference is not None
    assert summary.max_rel_difference < 1e-5


@pytest.mark.parametrize(("w", "a"), BITS)
def test_inputs_beyond_the_range_are_clamped_alike(w: int, a: int, tmp_path: Path) -> None:
    model, x = make(Chain, w, a)
    export_openvino(model, x, tmp_path / "model.xml")
    network = OpenVINONetwork(tmp_path / "model.xml", threads=1)
    wide = 4 * example(Chain, seed=1)
    got, expected = network(wide), outputs_of(model, wide)[0]
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_float_layers_stay_float_and_are_told_apart(tmp_path: Path) -> None:
    model, x = make(Classifier, 7, 8)
    path = export_openvino(model, x, tmp_path / "model.xml").path
    compiled = OpenVINONetwork(path, threads=1).compiled
    kernels = layer_kernels(compiled)
    assert len(kernels) == 4
    assert len(check_int8(compiled, 3)) == len(int8_layers(compiled)) == 3
    with pytest.raises(ExportError, match=r"3 layers run in 8-bit integers where 4 .*/plain/Conv"):
        check_int8(compiled, 4)


def test_eight_bit_products_saturate_or_are_exact_and_seven_bits_always_are(tmp_path: Path) -> None:
    """The worst case: all weights and activations at their largest code, all of one sign.

    Without VNNI two products are added in 16 bits, which holds 2 * 255 * 64 and no more.
    """
    difference = {}
    for bits in (7, 8):
        layer = quantized(nn.Conv2d(16, 16, 3, bias=False), bits, 8)
        nn.init.ones_(layer.weight)
        x = torch.ones(1, 16, 8, 8)
        model = set_ranges(nn.Sequential(layer), x)
        difference[bits] = export_openvino(model, x, tmp_path / f"{bits}.xml").max_rel_difference
    assert difference[7] < 1e-6
    assert difference[8] < 1e-6 or difference[8] == pytest.approx(1 - 32767 / (2 * 255 * 127), rel=1e-3)


def test_an_onnx_file_converts_to_the_same(tmp_path: Path) -> None:
    model, x = make(Transposed, 7, 8)
    onnx_path = export_onnx(model, x, tmp_path / "model.onnx").path
    converted = export_openvino(onnx_path, x, tmp_path / "from_file.xml")
    assert converted.integer_layers is None
    assert converted.max_rel_difference is None
    direct = export_openvino(model, x, tmp_path / "direct.xml")
    assert converted.weights_path.read_bytes() == direct.weights_path.read_bytes()
    a, b = (OpenVINONetwork(s.path, threads=1)(x) for s in (converted, direct))
    assert torch.equal(a, b)
    with pytest.raises(ExportError, match="There is no ONNX file"):
        export_openvino(tmp_path / "missing.onnx", x, tmp_path / "missing.xml")
    assert not (tmp_path / "missing.xml").exists()
    onnx_path.write_bytes(b"no ONNX")
    with pytest.raises(ExportError, match=r"OpenVINO cannot convert model\.onnx"):
        export_openvino(onnx_path, x, tmp_path / "broken.xml")


def test_weights_are_stored_as_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 64, 8, 8)
    model = nn.Sequential(*(quantized(nn.Conv2d(64, 64, 3, padding=1), 8, 8) for _ in range(4)))
    set_ranges(model, x)
    summary = export_openvino(model, x, tmp_path / "model")
    assert summary.path == tmp_path / "model.xml"
    weights = sum(m.weight.numel() for m in model)
    assert weights < summary.weights_path.stat().st_size < 1.1 * weights
    assert summary.size_bytes == sum(p.stat().st_size for p in tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_files_and_no_other(tmp_path: Path) -> None:
    model, x = make(Chain, 8, 8)
    export_openvino(model, x, tmp_path / "model.xml")
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    assert {p.suffix for p in before} == {".xml", ".bin"}
    other, _ = make(Chain, 4, 8)
    for size in (500, 8000):  # room for nothing; room for the ONNX file and the weights, not the graph
        with largest_file(size), pytest.raises(ExportError):
            export_openvino(other, x, tmp_path / "model.xml")
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_an_export_error(tmp_path: Path) -> None:
    model, x = make(Chain, 8, 8)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ExportError, match="Cannot write"):
        export_openvino(model, x, tmp_path / "file" / "model.xml")


def test_the_model_keeps_its_mode(tmp_path: Path) -> None:
    model, x = make(Chain, 8, 8)
    model.train().second.eval()
    export_openvino(model, x, tmp_path / "model.xml")
    assert model.training and model.first.training and not model.second.training
    assert openvino.Core().read_model(tmp_path / "model.xml").is_dynamic()
