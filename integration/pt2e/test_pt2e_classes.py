"""Our classes on torchao's bases, and what happens when a class stands in the wrong host."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import QConfig, QConfigMapping
from torch.ao.quantization.quantize_fx import prepare_fx
from torch.fx import GraphModule
from torchao.quantization.pt2e import FakeQuantizeBase, ObserverBase
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

import repapq_plugin
from repapq_plugin import observers as core_observers
from repapq_plugin.errors import ConfigError, HostError
from repapq_plugin.hosts import pt2e
from repapq_plugin.quantizers import fake_quantize as core_fake_quantize

OBSERVERS = [
    "MinMaxObserver", "MSEObserver", "MAEObserver", "PercentileObserver",
    "PerChannelMinMaxObserver", "PerChannelMSEObserver",
]  # fmt: skip
FAKE_QUANTIZERS = ["LearnableFakeQuantize", "PerChannelLearnableFakeQuantize"]


def core_class(name: str) -> type[nn.Module]:
    return getattr(core_observers if "Observer" in name else core_fake_quantize, name)


def made(name: str, **kwargs: object) -> nn.Module:
    per_channel = "PerChannel" in name
    dtype = torch.int8 if per_channel else torch.uint8
    qscheme = torch.per_channel_symmetric if per_channel else torch.per_tensor_affine
    return getattr(pt2e, name)(dtype=dtype, qscheme=qscheme, **kwargs)


@pytest.mark.parametrize("name", OBSERVERS + FAKE_QUANTIZERS)
def test_each_stands_on_torchaos_base_and_says_what_ours_says(name: str) -> None:
    kind = getattr(pt2e, name)
    assert issubclass(kind, ObserverBase if name in OBSERVERS else FakeQuantizeBase)
    ours = made(name)
    per_channel = "PerChannel" in name
    kwargs = {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric} if per_channel else {}
    theirs = core_class(name)(**kwargs)
    for _ in range(2):
        x = torch.randn(6, 5)
        assert torch.equal(ours(x), theirs(x))
    assert all(map(torch.equal, ours.calculate_qparams(), theirs.calculate_qparams()))
    for key in ("qscheme", "quant_min", "quant_max", "ch_axis"):
        assert getattr(ours, key) == getattr(theirs, key)
    assert ours.dtype in (torch.uint8, torch.int8)


@pytest.mark.parametrize("copied", ["state", "deepcopy", "pickle"])
@pytest.mark.parametrize("name", OBSERVERS + FAKE_QUANTIZERS)
def test_state_survives(name: str, copied: str) -> None:
    ours = made(name)
    ours(torch.randn(6, 5))
    if copied == "state":
        other = made(name)
        assert other.load_state_dict(ours.state_dict()) == ([], [])
    else:
        other = copy.deepcopy(ours) if copied == "deepcopy" else pickle.loads(pickle.dumps(ours))
    assert all(map(torch.equal, ours.calculate_qparams(), other.calculate_qparams()))
    x = torch.randn(6, 5)
    assert torch.equal(ours(x), other(x))
    assert all(map(torch.equal, ours.calculate_qparams(), other.calculate_qparams()))


def test_an_observer_of_ours_can_be_named_in_a_fake_quantizer() -> None:
    quantizer = made("LearnableFakeQuantize", observer=pt2e.PercentileObserver, percentile=90.0)
    assert isinstance(quantizer.activation_post_process, core_observers.PercentileObserver)
    assert quantizer.activation_post_process.percentile == 90.0
    factory = pt2e.MSEObserver.with_args(candidates=7)
    assert made("LearnableFakeQuantize", observer=factory).activation_post_process.candidates == 7
    with pytest.raises(ConfigError, match="observer="):
        made("LearnableFakeQuantize", observer=lambda **_: nn.Identity())


# The wrong host


class Names(Quantizer):
    """A quantizer that names classes."""

    def __init__(self, activation: Callable[..., nn.Module], weight: Callable[..., nn.Module]) -> None:
        self.activation = QuantizationSpec(torch.uint8, activation, 0, 255, torch.per_tensor_affine)
        self.weight = QuantizationSpec(torch.int8, weight, -127, 127, torch.per_channel_symmetric, 0)

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            if node.target is torch.ops.aten.linear.default:
                inputs = {node.args[0]: self.activation, node.args[1]: self.weight}
                node.meta["quantization_annotation"] = QuantizationAnnotation(inputs, _annotated=True)
        return model

    def validate(self, model: GraphModule) -> None:
        pass


def exported() -> tuple[GraphModule, Tensor]:
    x = torch.randn(2, 4)
    return torch.export.export(nn.Sequential(nn.Linear(4, 3)).eval(), (x,)).module(), x


@pytest.mark.parametrize("with_args", [False, True])
@pytest.mark.parametrize("name", OBSERVERS + FAKE_QUANTIZERS)
def test_a_class_of_torch_ao_in_pt2e_is_refused_with_the_right_name(name: str, with_args: bool) -> None:
    kind = core_class(name)
    named = kind.with_args() if with_args else kind
    right = {"activation": pt2e.MinMaxObserver, "weight": pt2e.PerChannelMinMaxObserver}
    place = "weight" if "PerChannel" in name else "activation"
    graph, _ = exported()
    with pytest.raises(HostError, match=rf"repapq_plugin\.hosts\.pt2e\.{name}\b"):
        prepare_pt2e(graph, Names(**{**right, place: named}))


@pytest.mark.parametrize("name", ["MAEObserver", "LearnableFakeQuantize"])
def test_a_class_of_pt2e_in_a_qconfig_is_refused_with_the_right_name(name: str) -> None:
    kind = getattr(pt2e, name)
    right = repapq_plugin.observers.PerChannelMinMaxObserver.with_args(
        dtype=torch.qint8, qscheme=torch.per_channel_symmetric
    )
    for named in (kind, kind.with_args(), kind.with_args(dtype=torch.quint8)):
        mapping = QConfigMapping().set_global(QConfig(activation=named, weight=right))
        with pytest.raises(HostError, match=rf"repapq_plugin\.{name} instead"):
            prepare_fx(nn.Sequential(nn.Linear(4, 3)).eval(), mapping, (torch.randn(2, 4),))


def test_the_right_classes_quantize() -> None:
    graph, x = exported()
    prepared = prepare_pt2e(graph, Names(pt2e.MAEObserver, pt2e.PerChannelMSEObserver))
    prepared(x)
    seen = [type(module).__name__ for module in prepared.modules() if isinstance(module, ObserverBase)]
    assert sorted(seen) == ["MAEObserver", "PerChannelMSEObserver"]
