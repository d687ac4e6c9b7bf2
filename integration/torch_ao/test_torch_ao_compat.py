"""Every private or undocumented thing of torch.ao that `hosts/torch_ao/_compat.py` uses is still there."""

from __future__ import annotations

import copy
import importlib
import warnings

import pytest
import torch
from torch import nn
from torch.ao.quantization import QConfigMapping, prepare, prepare_qat
from torch.ao.quantization.quantize_fx import prepare_fx, prepare_qat_fx
from torch.fx import symbolic_trace

from repapq_plugin.hosts import torch_ao
from repapq_plugin.hosts.torch_ao import _compat
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize

SEEN = f"seen with torch 2.12.1, this is torch {torch.__version__}"


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()


def x() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


def quietly(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


@pytest.mark.parametrize("name", ["is_copy_node", "is_general_tensor_shape_node", "is_other_node"])
def test_the_checks_for_operators_that_move_values(name: str) -> None:
    module = importlib.import_module("torch.ao.quantization.fx._lower_to_native_backend")
    assert callable(getattr(module, name, None)), f"{name} is gone ({SEEN}): _compat.MOVING"


@pytest.mark.parametrize(
    ("make", "moves"),
    [
        (lambda x: torch.flatten(x, 1), True),
        (lambda x: torch.cat([x, x]), True),
        (lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 1), True),
        (lambda x: x + x, False),
    ],
)
def test_they_tell_what_moves_values(make, moves: bool) -> None:
    graph = symbolic_trace(make)
    node = list(graph.graph.nodes)[-2]
    assert any(any(check(node, {})) for check in _compat.MOVING) == moves, f"their answers changed ({SEEN})"


@pytest.mark.parametrize("kind", [*_compat.RECTIFIED, *_compat.NORMED])
def test_fused_classes_are_public(kind: type) -> None:
    assert kind.__module__.startswith("torch.ao.nn.intrinsic"), f"{kind.__name__} has moved ({SEEN})"


@pytest.mark.parametrize("is_qat", [False, True])
def test_what_fusing_makes_of_layers(is_qat: bool) -> None:
    mapping = QConfigMapping().set_global(torch_ao.repapq_qconfig("w8a8", is_qat=is_qat))
    prepared = quietly(prepare_qat_fx if is_qat else prepare_fx, layers().train(is_qat), mapping, (x(),))
    fused, last = (prepared.get_submodule(name) for name in ("0", "3"))
    assert isinstance(fused, _compat.RECTIFIED), f"{type(fused)} is not in _compat.RECTIFIED ({SEEN})"
    assert isinstance(_compat.layer_of(fused), nn.Conv2d), f"_compat.layer_of finds no layer ({SEEN})"
    assert isinstance(fused, _compat.NORMED) == is_qat, f"_compat.NORMED misses {type(fused)} ({SEEN})"
    for module in (fused, last):
        assert _compat.qconfig_of(module) is not None, f"layers hold no qconfig any more ({SEEN})"
        quantizer = _compat.trained_weight_quantizer_of(module)
        assert isinstance(quantizer, LearnableFakeQuantize) == is_qat, f"weight_fake_quant is gone ({SEEN})"
        plain = _compat.plain_layer(_compat.layer_of(module))
        assert type(plain) is nn.Conv2d and _compat.qconfig_of(plain) is None, f"to_float changed ({SEEN})"
    if is_qat:
        assert isinstance(_compat.norm_of(fused), nn.BatchNorm2d), f"bn is gone ({SEEN})"


@pytest.mark.parametrize("is_qat", [False, True])
def test_what_eager_mode_hangs_on_modules(is_qat: bool) -> None:
    network = layers().train(is_qat)
    _compat.set_qconfig(network, torch_ao.repapq_qconfig("w8a8", is_qat=is_qat))
    prepared = quietly(prepare_qat if is_qat else prepare, network)
    watched = _compat.output_quantizer_of(prepared[3])
    assert _compat.is_quantizer(watched), f"activation_post_process is gone ({SEEN})"
    assert _compat.output_quantizer_of(LearnableFakeQuantize()) is None
    seen = prepared(x())
    low, high = watched.calculate_qparams()[0], seen.detach().abs().max()
    assert low > 0 and high > 0, f"hooks do not feed activation_post_process any more ({SEEN})"


def test_what_a_conversion_reads_is_what_ours_have() -> None:
    for module in (LearnableFakeQuantize(), torch_ao.repapq_qconfig("w8a8").activation()):
        assert _compat.is_quantizer(module), f"torch.ao takes {type(module)} for no quantizer ({SEEN})"
        for name in ("dtype", "quant_min", "quant_max", "calculate_qparams"):
            assert hasattr(module, name), f"{name} is gone from {type(module)}"


def test_a_mapping_matches_regular_expressions_from_the_start_and_takes_the_first() -> None:
    four, six = (torch_ao.repapq_qconfig(bits) for bits in ("w4a4", "w6a6"))
    mapping = QConfigMapping().set_global(torch_ao.repapq_qconfig("w8a8"))
    mapping.set_module_name_regex(r"0\Z", four).set_module_name_regex(r"[03]\Z", six).set_module_name_regex(r"3", four)
    prepared = quietly(prepare_fx, copy.deepcopy(layers()), mapping, (x(),))
    bounds = [_compat.qconfig_of(prepared.get_submodule(name)).weight().quant_max for name in ("0", "3")]
    assert bounds == [7, 31], f"set_module_name_regex matches otherwise ({SEEN})"
