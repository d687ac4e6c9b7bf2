"""Every undocumented thing of torchao and of exported graphs that `hosts/pt2e/_compat.py` uses is still there."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import FakeQuantizeBase
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, Quantizer, quantizer

from repapq_plugin.hosts import pt2e
from repapq_plugin.hosts.pt2e import _compat
from repapq_plugin.hosts.pt2e.graph import LAYER_TARGETS, groups, layer_nodes, output_axis, quantizer_at
from repapq_plugin.hosts.pt2e.quantizer import quantization_specs
from repapq_plugin.quantizers.layers import QUANTIZABLE

SEEN = f"seen with torch 2.12.1 and torchao 0.18, this is torch {torch.__version__} and torchao {version('torchao')}"


class Nested(nn.Module):
    """Every kind of layer, one of them inside another module."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU())
        self.same = nn.Conv2d(4, 4, 3, padding="same", groups=2)
        self.up = nn.ConvTranspose2d(4, 6, 2, 2, groups=2)
        self.row, self.row_same = nn.Conv1d(6, 6, 3), nn.Conv1d(6, 6, 3, padding="same")
        self.cube, self.cube_same = nn.Conv3d(6, 6, 1), nn.Conv3d(6, 6, 1, padding="same")
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.row_same(self.row(self.up(self.same(self.block(x))).flatten(2)))
        x = self.cube_same(self.cube(x[..., None, None]))
        return self.fc(x.mean((2, 3, 4)))


NAMES = ["block.0", "same", "up", "row", "row_same", "cube", "cube_same", "fc"]


def exported(strict: bool = False) -> GraphModule:
    return torch.export.export(Nested().eval(), (torch.randn(2, 3, 8, 8),), strict=strict).module()


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_graph_says_where_layers_stood(strict: bool) -> None:
    nodes = list(layer_nodes(exported(strict)))
    assert [_compat.module_path(node) for node in nodes] == NAMES, f"{_compat.MODULES} says it otherwise ({SEEN})"
    for node in nodes:
        assert _compat.FACTS[0] in node.meta, f"{_compat.FACTS[0]} is gone from node.meta ({SEEN})"


def test_operators_of_layers_and_their_arguments() -> None:
    nodes = list(layer_nodes(exported()))
    assert {node.target for node in nodes} == set(LAYER_TARGETS), f"layers are exported as other operators ({SEEN})"
    assert [groups(node) for node in nodes] == [1, 2, 2, 1, 1, 1, 1, 1], f"groups are no longer argument 6 ({SEEN})"
    assert [output_axis(node) for node in nodes] == [0, 0, 1, 0, 0, 0, 0, 0]
    assert len(QUANTIZABLE) == 5


def test_the_key_of_an_annotation() -> None:
    assert quantizer.Q_ANNOTATION_KEY == _compat.ANNOTATION, f"the key has another name ({SEEN})"
    annotation = QuantizationAnnotation(_annotated=True)
    assert annotation.input_qspec_map == {}, f"input_qspec_map is gone ({SEEN})"
    assert annotation._annotated, f"_annotated is gone ({SEEN})"


class OnlyTheLast(Quantizer):
    """Annotates one layer."""

    def annotate(self, model: GraphModule) -> GraphModule:
        *_, node = layer_nodes(model)
        activation, weight = quantization_specs(pt2e.RepAPQQuantizer().config, 4, 5)
        _compat.annotate(node, {node.args[0]: activation, node.args[1]: weight})
        assert _compat.is_annotated(node)
        return model

    def validate(self, model: GraphModule) -> None:
        pass


def test_pt2e_reads_the_annotation_and_gives_the_axis_by_the_name_of_the_class() -> None:
    prepared = prepare_pt2e(exported(), OnlyTheLast())
    *_, node = layer_nodes(prepared)
    activation, weight = (quantizer_at(prepared, argument) for argument in node.args[:2])
    assert isinstance(activation, pt2e.MSEObserver), f"the annotation was not read ({SEEN})"
    assert _compat.PER_CHANNEL in type(weight).__name__
    prepared(torch.randn(2, 3, 8, 8))
    assert weight.calculate_qparams()[0].shape == (5,), f"ch_axis is not given by the class name ({SEEN})"
    assert quantizer_at(prepared, next(layer_nodes(prepared)).args[0]) is None


@pytest.mark.parametrize("kind", [pt2e.LearnableFakeQuantize, pt2e.PerChannelLearnableFakeQuantize])
def test_with_args_is_torchaos(kind: type) -> None:
    assert hasattr(FakeQuantizeBase.with_args, "__func__"), f"with_args is no class method any more ({SEEN})"
    factory = kind.with_args(quant_min=0, quant_max=15).with_args(dtype=torch.uint8)
    assert type(factory).__module__.startswith("torchao"), f"with_args makes something else ({SEEN})"
    made = factory()
    assert type(made) is kind and made.quant_max == 15


def test_what_a_new_node_copies() -> None:
    graph = exported()
    source = next(layer_nodes(graph))
    source.meta["other"] = 1
    with graph.graph.inserting_after(source):
        target: Node = graph.graph.call_function(torch.relu, (source,))
    _compat.copy_facts(source, target)
    assert "val" in target.meta and not {"other", _compat.MODULES} & set(target.meta)
    _compat.copy_facts(source, target, with_modules=True)
    assert _compat.module_path(target) == "block.0"


@pytest.mark.parametrize("is_qat", [False, True])
def test_torchaos_quantizer_for_inductor(is_qat: bool) -> None:
    made = pt2e.x86_inductor_quantizer("w8a8", is_qat=is_qat)
    assert type(made).__name__ == "X86InductorQuantizer", f"it has another name ({SEEN})"
    assert made.global_config is not None, f"set_global keeps its configuration elsewhere ({SEEN})"
